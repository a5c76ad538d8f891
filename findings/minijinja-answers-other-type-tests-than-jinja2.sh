#!/usr/bin/env bash
# minijinja 3.1.0 answers Jinja2's type tests otherwise than Jinja2 3.1.6 does, so chat templates take other branches.
#
# `none is iterable` is true in minijinja and false in Jinja2; `'text' is sequence` and `{} is sequence` are false and
# true; both with and without the Python methods of minijinja-contrib. Chat templates ask such things to tell whether
# there are tools and whether a message's content is a list of parts: `{% if tools is iterable %}` opens a tool section
# for a chat without tools, and nothing fails. Floats are printed otherwise too: 1e20 as 100000000000000000000.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir -p "$work/src"
cat > "$work/Cargo.toml" <<'TOML'
[package]
name = "render"
version = "0.1.0"
edition = "2024"

[dependencies]
minijinja = "=3.1.0"
minijinja-contrib = { version = "=3.1.0", features = ["pycompat"] }
TOML
cat > "$work/src/main.rs" <<'RS'
fn main() {
    let mut jinja = minijinja::Environment::new();
    jinja.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    for expression in std::io::stdin().lines() {
        let template = format!("{{{{ {} }}}}", expression.unwrap());
        println!("{}", jinja.render_str(&template, ()).unwrap());
    }
}
RS
cat > "$work/expressions" <<'TXT'
none is iterable
'text' is sequence
{} is sequence
'text' is iterable
[] is sequence
{} is mapping
1e20
TXT
cat > "$work/expected" <<'TXT'
none is iterable    Jinja2 False  minijinja True
'text' is sequence  Jinja2 True  minijinja False
{} is sequence      Jinja2 True  minijinja False
'text' is iterable  Jinja2 True  minijinja True
[] is sequence      Jinja2 True  minijinja True
{} is mapping       Jinja2 True  minijinja True
1e20                Jinja2 1e+20  minijinja 100000000000000000000.0
TXT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet jinja2==3.1.6
cargo run --quiet < expressions > by_minijinja
venv/bin/python - > by_jinja2 <<'PY'
import jinja2

for line in open("expressions"):
    print(jinja2.Environment().from_string("{{ " + line + " }}").render())
PY
paste -d '\t' expressions by_jinja2 by_minijinja |
    awk -F '\t' '{ printf "%-19s Jinja2 %s  minijinja %s\n", $1, $2, $3 }' | tee seen
diff expected seen || { echo "CHANGED"; exit 1; }
echo "as described"
