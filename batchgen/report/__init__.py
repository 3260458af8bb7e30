"""What a job did: one value (`value`), made of stats alone, and that value as text, JSON and one offline page (`page`).

`records` and `reading` read what runs left; `waste`, `lanes`, `gates`, `distributions` and `by` are pure figures of it;
`svg` and `charts` draw. Only `generations` looks at rows, and only where somebody asked for them.
"""
