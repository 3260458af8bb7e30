"""What a shard file says of itself, from its footer alone, and whether all of it is what was written.

Whatever is wrong with the bytes is one OutputError with the file's name and the mend.
"""

from batchgen.batches import FileFooter
from batchgen.errors import OutputError
from batchgen.gates.texts import TextSample, parse_text_sample
from batchgen.storage import Storage
from batchgen.verify.damage import refusing_damage
from batchgen.worker.seal import END_BYTES, Seal, digest, find_footer, open_footer, read_footer_bytes, read_seal
from batchgen.write import FORMAT_VERSION, TEXTS_KEY, read_file_footer

NOT_OURS = "was not written by this version of batchgen; choose another output.path"


def read_footer(storage: Storage, path: str) -> tuple[FileFooter, str]:
    """(the footer of one shard file, its digest). Raises OutputError when it is not one of batchgen's, NotFound when it is
    gone."""
    with refusing_damage(storage.url(path), NOT_OURS):
        with storage.open_read(path) as source:
            content = read_footer_bytes(source)
        return parse_footer(content, storage.url(path))[0], digest(content)


def read_text_sample(storage: Storage, path: str, footer_sha256: str) -> TextSample | None:
    """What a shard file says of its texts; None where its maker was not asked. Raises OutputError where the footer is not
    that of this digest."""
    with refusing_damage(storage.url(path), NOT_OURS):
        with storage.open_read(path) as source:
            content = read_footer_bytes(source)
        if digest(content) != footer_sha256:
            raise make_changed(storage.url(path))
        raw = (open_footer(content).metadata.metadata or {}).get(TEXTS_KEY)
        return None if raw is None else parse_text_sample(raw)


def read_whole_file(data: bytes, url: str) -> FileFooter:
    """The footer of a shard file whose bytes are all here. Raises OutputError where they are not those that its footer
    seals."""
    with refusing_damage(url, NOT_OURS):
        start = find_footer(data[-END_BYTES:], len(data))
        footer, seal = parse_footer(data[start:], url)
        if seal.body_sha256 is not None and digest(data[:start]) != seal.body_sha256:
            raise make_changed(url)
    return footer


def make_changed(url: str) -> OutputError:
    return OutputError(f"{url}: was changed since it was written; restore it, or delete it to generate it again")


def parse_footer(content: bytes, url: str) -> tuple[FileFooter, Seal]:
    """(what the footer says, its seal), of a footer's bytes."""
    parquet = open_footer(content)
    footer = read_file_footer(parquet)
    if footer is None or footer.format_version != FORMAT_VERSION:
        raise OutputError(f"{url}: {NOT_OURS}")
    return footer, read_seal(content, parquet)
