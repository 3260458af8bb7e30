// The page's only script. Everything shown is asked of the API; every text from there goes in as text, never as HTML.

const POLL_MS = 2000;
const REPORT_MS = 10_000; // of a job that runs the endpoint makes it anew each time
const FIRST_BYTES = 65536;
const FIRST_ROWS = 10;
const PART_BYTES = 8 * 2 ** 20; // of an upload, at a time: a server on the way may hold all of one request
const KEEP_POINTS = 300;
const ENDED = new Set(["completed", "failed", "expired", "cancelled"]);
const $ = (id) => document.getElementById(id);

let key = sessionStorage.getItem("batchgen-key") || "";
let chosen = null; // the id of the batch that is looked at
let limit = 20;
let isLooking = false;
let told = { at: 0 }; // the last report: of which batch, in which state, when
const seen = new Map(); // id -> [[seconds, rows done], ...]: rates come from two looks

async function call(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    const error = new Error(told?.error?.message || `The endpoint answered ${answer.status}.`);
    error.status = answer.status;
    throw error;
  }
  return answer;
}
const ask = async (path, options) => (await call(path, options)).json();

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (attribute === "class") made.className = value;
    else if (attribute.startsWith("on")) made.addEventListener(attribute.slice(2), value);
    else made.setAttribute(attribute, value);
  }
  made.append(...children);
  return made;
}
function drawing(viewBox, title, shapes) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", viewBox);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", title);
  for (const [name, attributes, tip] of shapes) {
    const shape = document.createElementNS(space, name);
    for (const [attribute, value] of Object.entries(attributes)) shape.setAttribute(attribute, value);
    if (tip) shape.append(Object.assign(document.createElementNS(space, "title"), { textContent: tip }));
    svg.append(shape);
  }
  return svg;
}

const number = (value) => (value === null || value === undefined ? "unknown" : value.toLocaleString("en"));
const rate = (value) => (value === null ? "–" : value >= 100 ? value.toFixed(0) : value.toPrecision(2));
const moment = (at) => (at ? new Date(at * 1000).toLocaleString() : "–");
const seconds = (value) =>
  value === null || value === undefined ? "unknown" : value < 1 ? `${(value * 1000).toPrecision(3)} ms` : `${value.toPrecision(3)} s`;

function warn(message) {
  $("alert").textContent = message || "";
  $("alert").hidden = !message;
}
async function attempt(act) {
  try {
    await act();
    warn("");
  } catch (error) {
    $("alert").dataset.kind = "act";
    warn(error.message);
  }
}

// ---- who asks

function showKey(isNeeded) {
  $("key-form").hidden = !isNeeded;
  $("sign-out").hidden = isNeeded || !key;
  $("start").hidden = isNeeded;
}
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  sessionStorage.setItem("batchgen-key", key);
  look();
});
$("sign-out").addEventListener("click", () => {
  sessionStorage.removeItem("batchgen-key");
  location.reload();
});

// ---- the list

function remember(batch) {
  const { completed, failed } = batch.request_counts;
  const points = seen.get(batch.id) || [];
  points.push([performance.now() / 1000, completed + failed]);
  seen.set(batch.id, points.slice(-KEEP_POINTS));
}
function findRate(id, over = 15) {
  const points = seen.get(id) || [];
  const last = points.at(-1);
  const first = points.find(([at]) => last && last[0] - at <= over);
  return first && last[0] > first[0] ? (last[1] - first[1]) / (last[0] - first[0]) : null;
}
function makeMeter({ total, completed, failed }) {
  const share = (rows) => (total ? (1000 * rows) / total : 0);
  const bars = [
    ["rect", { class: "ok", x: 0, y: 0, width: share(completed), height: 10 }],
    ["rect", { class: "bad", x: share(completed), y: 0, width: share(failed), height: 10 }],
  ];
  const told = `${number(completed + failed)} of ${number(total)}`;
  return element("div", {}, element("div", { class: "meter" }, drawing("0 0 1000 10", told, bars)), element("span", { class: "small" }, told));
}
function makeRow(batch) {
  const name = batch.metadata?.job || batch.id;
  const isOpen = !ENDED.has(batch.status);
  const row = element(
    "tr",
    {},
    element("td", {}, element("button", { onclick: () => choose(batch.id), title: batch.id }, name.length > 22 ? `${name.slice(0, 20)}…` : name)),
    element("td", {}, element("span", { class: `state ${batch.status}` }, batch.status.replace("_", " "))),
    element("td", {}, makeMeter(batch.request_counts)),
    element("td", {}, isOpen ? rate(findRate(batch.id)) : "–"),
    element("td", {}, number(batch.request_counts.failed)),
    element("td", { class: "small" }, moment(batch.created_at)),
  );
  if (batch.id === chosen) row.setAttribute("aria-current", "true");
  return row;
}
async function look() {
  try {
    const list = await ask(`/v1/batches?limit=${limit}`);
    showKey(false);
    list.data.forEach(remember);
    const focused = document.activeElement?.title;
    document.querySelector("#list tbody").replaceChildren(...list.data.map(makeRow));
    if (focused) document.querySelector(`#list button[title="${CSS.escape(focused)}"]`)?.focus();
    $("list").hidden = !list.data.length;
    $("none").hidden = list.data.length > 0;
    $("more").hidden = !list.has_more || limit >= 100;
    const models = await ask("/v1/models");
    $("models").textContent = models.data.map((model) => model.id).join(", ");
    if (chosen) await show();
    if ($("alert").dataset.kind === "poll") warn("");
  } catch (error) {
    if (error.status === 401) showKey(true);
    $("alert").dataset.kind = "poll";
    warn(error.status === 401 && !key ? "" : error.status ? error.message : "The endpoint does not answer; trying again.");
  }
}
$("more").addEventListener("click", () => {
  limit = 100;
  look();
});

// ---- one batch

function choose(id) {
  chosen = id;
  $("results").replaceChildren();
  $("one").hidden = false;
  look().then(() => $("one-title").scrollIntoView({ behavior: "smooth", block: "nearest" }));
}
async function show() {
  const id = chosen;
  const batch = await ask(`/v1/batches/${id}`);
  const report = await findReport(batch);
  if (id !== chosen) return;
  $("one-title").textContent = batch.metadata?.job || batch.id;
  $("cancel").disabled = ENDED.has(batch.status) || batch.status === "cancelling";
  $("first").disabled = $("output").disabled = !batch.output_file_id;
  $("errors").disabled = !batch.error_file_id;
  $("cancel").onclick = () => cancel(id);
  $("first").onclick = () => attempt(() => showFirst(batch.output_file_id));
  $("output").onclick = () => attempt(() => save(batch.output_file_id, `${id}-output.jsonl`));
  $("errors").onclick = () => attempt(() => save(batch.error_file_id, `${id}-errors.jsonl`));
  $("facts").replaceChildren(...listFacts(batch).flatMap(([name, value]) => [element("div", {}, element("dt", {}, name), element("dd", {}, value))]));
  showRates(batch);
  showLatency(report);
  showErrors(batch, report);
}
async function findReport({ id, status }) {
  const isSame = told.id === id && told.status === status;
  if (isSame && (performance.now() - told.at < REPORT_MS || (told.report && ENDED.has(status)))) return told.report;
  const report = await ask(`/v1/batches/${id}/report`).catch((error) => {
    if (error.status === 409 || error.status === 404) return null;
    throw error;
  });
  told = { id, status, report, at: performance.now() };
  return report;
}
function listFacts(batch) {
  const { total, completed, failed } = batch.request_counts;
  const ended = batch.completed_at || batch.failed_at || batch.expired_at || batch.cancelled_at;
  const facts = [
    ["State", batch.status.replace("_", " ")],
    ["Rows", number(total)],
    ["Completed", number(completed)],
    ["Failed", number(failed)],
    ["Model", batch.model || "unknown"],
    [ended ? "Ended" : "Due", moment(ended || batch.expires_at)],
  ];
  if (batch.usage) facts.push(["Input tokens", number(batch.usage.input_tokens)], ["Output tokens", number(batch.usage.output_tokens)]);
  return facts;
}
function showRates(batch) {
  const points = seen.get(batch.id) || [];
  const rates = points.slice(1).map(([at, done], index) => [at, Math.max(0, (done - points[index][1]) / (at - points[index][0]))]);
  if (rates.length < 2) {
    $("rate-note").textContent = "";
    $("rate-plot").replaceChildren(element("p", { class: "small" }, ENDED.has(batch.status) ? "It has ended." : "Watching…"));
    return;
  }
  const top = Math.max(...rates.map(([, value]) => value)) || 1;
  const begin = rates[0][0];
  const span = rates.at(-1)[0] - begin || 1;
  const line = rates.map(([at, value]) => `${(1000 * (at - begin)) / span},${100 - (95 * value) / top}`).join(" ");
  $("rate-note").textContent = `now ${rate(findRate(batch.id))}, most ${rate(top)}`;
  $("rate-plot").replaceChildren(
    drawing("0 0 1000 100", `Rows a second while this page was open, at most ${rate(top)}`, [["polyline", { class: "line", points: line }]]),
    element("div", { class: "axis" }, element("span", {}, `${Math.round(span)} s ago`), element("span", {}, "now")),
  );
}
function showLatency(report) {
  const bars = report?.histograms?.latency || [];
  if (!bars.length) {
    $("latency-note").textContent = "";
    $("latency-plot").replaceChildren(element("p", { class: "small" }, "Nothing committed yet."));
    return;
  }
  const top = Math.max(...bars.map((bar) => bar[2])) || 1;
  const width = 1000 / bars.length;
  const shapes = bars.map(([from, to, rows], index) => [
    "rect",
    { class: "bar", x: index * width + 1, y: 100 - (98 * rows) / top, width: Math.max(1, width - 2), height: (98 * rows) / top },
    `${seconds(from)} to ${seconds(to)}: ${number(rows)}`,
  ]);
  const found = report.job?.latency || {};
  $("latency-note").textContent = `median ${seconds(found.latency_p50_s)}, p99 ${seconds(found.latency_p99_s)}`;
  $("latency-plot").replaceChildren(
    drawing("0 0 1000 100", "Rows by latency", shapes),
    element("div", { class: "axis" }, element("span", {}, seconds(bars[0][0])), element("span", {}, seconds(bars.at(-1)[1]))),
  );
}
function showErrors(batch, report) {
  const rows = [
    ...(batch.errors?.data || []).map((error) => [error.code, error.line ? `line ${error.line}` : "", error.message]),
    ...(report?.errors || []).map((error) => [error.error_type, number(error.count), error.example || ""]),
  ];
  if (!rows.length) return $("error-table").replaceChildren();
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell))));
  $("error-table").replaceChildren(element("h2", {}, "Errors"), element("div", { class: "scroll" }, element("table", {}, element("tbody", {}, ...body))));
}
async function cancel(id) {
  await attempt(() => ask(`/v1/batches/${id}/cancel`, { method: "POST" }));
  look();
}

// ---- results

async function showFirst(fileId) {
  const answer = await call(`/v1/files/${fileId}/content`, { headers: { range: `bytes=0-${FIRST_BYTES - 1}` } });
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  while (text.length < FIRST_BYTES) {
    const { done, value } = await reader.read();
    if (done) break;
    text += decoder.decode(value, { stream: true });
  }
  await reader.cancel();
  const lines = text.split("\n").filter((line) => line.endsWith("}")).slice(0, FIRST_ROWS);
  $("results").replaceChildren(element("h2", {}, "First results"), ...lines.map(makeResult).filter(Boolean));
}
function makeResult(line) {
  let row;
  try {
    row = JSON.parse(line);
  } catch {
    return null; // the range ended inside it
  }
  const choice = row.response?.body?.choices?.[0];
  const text = choice?.message?.content ?? choice?.text ?? row.error?.message ?? "";
  return element("div", { class: "result" }, element("span", { class: "small" }, `${row.custom_id} · ${choice?.finish_reason || "error"}`), element("pre", {}, text));
}
async function save(fileId, name) {
  const blob = await (await call(`/v1/files/${fileId}/content`)).blob();
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---- start one

function pickFile() {
  const file = $("file").files[0];
  $("file-name").textContent = file ? `${file.name} (${number(file.size)} bytes)` : "Choose a JSONL file, or drop it here";
  $("go").disabled = !file;
}
$("file").addEventListener("change", pickFile);
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") {
      $("file").files = event.dataTransfer.files;
      pickFile();
    }
  });
}
function post(path, body) {
  return ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
}
function send(path, fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return ask(path, { method: "POST", body: form });
}
async function upload(file) {
  if (file.size <= PART_BYTES) return send("/v1/files", { purpose: "batch", file });
  const { id } = await post("/v1/uploads", { bytes: file.size, filename: file.name, mime_type: "application/jsonl", purpose: "batch" });
  const parts = [];
  for (let start = 0; start < file.size; start += PART_BYTES) {
    $("upload").value = start / file.size;
    parts.push((await send(`/v1/uploads/${id}/parts`, { data: file.slice(start, start + PART_BYTES) })).id);
  }
  return (await post(`/v1/uploads/${id}/complete`, { part_ids: parts })).file;
}
$("start-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("go").disabled = true;
  $("upload").value = 0;
  $("upload").hidden = false;
  await attempt(async () => {
    const file = await upload($("file").files[0]);
    const body = { input_file_id: file.id, endpoint: $("endpoint").value, completion_window: $("window").value };
    const batch = await post("/v1/batches", body);
    $("start-form").reset();
    choose(batch.id);
  });
  $("upload").hidden = true;
  pickFile();
});

look();
setInterval(async () => {
  if (document.hidden || isLooking) return; // a slow endpoint is not asked again before it answered
  isLooking = true;
  await look();
  isLooking = false;
}, POLL_MS);
