//! A template's source, written as our engine reads it: what Jinja2 and HF transformers understand and it does not.
//!
//! `a % b` becomes a call, as `%` formats strings there; `{% generation %}` a scope; strings are spelled out, as escapes
//! that Python does not know keep their backslash; line ends are `\n`. All else, raw blocks and comments too, stays.

use anyhow::{Result, ensure};

use super::nesting::{MAX_NESTING, Nesting};

/// The function that stands for `%`.
pub(super) const MODULO: &str = "python_modulo";

/// The same template for our engine.
///
/// # Errors
/// What the engine does not survive: a loop that is left from inside a scope of its own, and what is nested too deep. What
/// it has not: arguments of a macro that its list does not name.
pub(super) fn adapted(source: &str) -> Result<String> {
    let mut blocks = Blocks::default();
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let (mut out, mut rest) = (String::with_capacity(source.len()), source.as_str());
    while let Some(at) = rest.find('{') {
        let opener = at + rest.get(at..at + 2).map_or(1, str::len);
        out.push_str(&rest[..opener]);
        let inside = &rest[opener..];
        let len = match &rest[at..opener] {
            "{#" => inside.find("#}").map_or(inside.len(), |end| end + 2),
            "{%" if tag_name(inside) == "raw" => raw_len(inside),
            "{%" => {
                let body = body(inside);
                blocks.enter(body)?;
                out.push_str(&inside[..inside.len() - body.len()]);
                let len = match generation(body) {
                    Some((stand_in, len)) => {
                        out.push_str(stand_in);
                        len
                    }
                    None => expression(body, "%}", &blocks, &mut out)?,
                };
                rest = &body[len..];
                continue;
            }
            "{{" => {
                let mark = inside.len() - inside.strip_prefix(['-', '+']).unwrap_or(inside).len();
                out.push_str(&inside[..mark]);
                rest = &inside[mark + expression(&inside[mark..], "}}", &blocks, &mut out)?..];
                continue;
            }
            _ => 0,
        };
        out.push_str(&inside[..len]);
        rest = &inside[len..];
    }
    Ok(out + rest)
}

/// The loops and scopes around a place, the outermost first.
#[derive(Default)]
struct Blocks<'a> {
    names: Vec<&'a str>,
    /// The branches of each `if` around the place.
    branches: Vec<usize>,
    /// The tag of the macro around the place.
    signature: Option<&'a str>,
}

impl<'a> Blocks<'a> {
    /// Goes past a tag.
    fn enter(&mut self, body: &'a str) -> Result<()> {
        let name = tag_name(body);
        match name {
            "for" | "with" | "generation" | "filter" | "call" => self.names.push(name),
            "macro" => {
                self.names.push(name);
                self.signature = Some(body.split("%}").next().unwrap_or_default());
            }
            "if" => self.branches.push(1),
            "endif" => _ = self.branches.pop(),
            "elif" => {
                let branches = self.branches.last_mut().map_or(0, |branches| {
                    *branches += 1;
                    *branches
                });
                ensure!(branches <= MAX_NESTING, "an `if` has more than {MAX_NESTING} branches");
            }
            "set" => {
                let target = body[name.len()..].trim_start().trim_start_matches(is_word).trim_start();
                if ["|", "%}", "-%}", "+%}"].iter().any(|begin| target.starts_with(begin)) {
                    self.names.push(name); // it has a body
                }
            }
            "break" | "continue" => ensure!(
                self.names.last().is_none_or(|block| *block == "for"),
                "`{name}` stands inside `{}`, which is not supported: put it outside, or use `if` in its place",
                self.names.last().copied().unwrap_or_default()
            ),
            _ => {
                if self.names.last().is_some_and(|block| name.strip_prefix("end") == Some(block)) {
                    self.names.pop();
                    self.signature = self.signature.filter(|_| name != "endmacro");
                }
            }
        }
        Ok(())
    }

    /// `varargs` and `kwargs` hold what a macro is called with beyond the arguments that it names.
    fn refuse_more_arguments(&self, word: &str) -> Result<()> {
        let Some(signature) = self.signature.filter(|_| ["varargs", "kwargs"].contains(&word)) else { return Ok(()) };
        let is_named = signature.split(|c| !is_word(c)).any(|name| name == word);
        ensure!(is_named, "`{word}` in a macro is not supported: name the macro's arguments in `{}`", signature.trim());
        Ok(())
    }
}

/// A tag's words, without the mark that strips what stands before it.
fn body(tag: &str) -> &str {
    tag.strip_prefix(['-', '+']).unwrap_or(tag).trim_start()
}

fn tag_name(tag: &str) -> &str {
    let body = body(tag);
    &body[..body.find(|c: char| !is_word(c)).unwrap_or(body.len())]
}

/// How long a raw block is, its end tag included; `tag` begins inside the tag that opens it.
fn raw_len(tag: &str) -> usize {
    let mut at = 0;
    while let Some(found) = tag[at..].find("{%") {
        at += found + 2;
        if tag_name(&tag[at..]) == "endraw" {
            return tag[at..].find("%}").map_or(tag.len(), |end| at + end + 2);
        }
    }
    tag.len()
}

/// What stands for `generation` and `endgeneration`, which mark for HF's training tools what the assistant writes, and
/// how long the word is. To rendering they are a scope of their own.
fn generation(body: &str) -> Option<(&'static str, usize)> {
    [("generation", "with"), ("endgeneration", "endwith")].into_iter().find_map(|(word, stand_in)| {
        let after = body.strip_prefix(word)?.trim_start();
        after.trim_start_matches(['-', '+']).starts_with("%}").then_some((stand_in, word.len()))
    })
}

/// What stands between two brackets, or in a tag, on its way to being written.
struct Level {
    /// Where in what is written the product begins that is being read.
    product: usize,
    /// Whether the right side of a `%` is being read.
    right_side: bool,
    /// Whether an operand was read, so that a `-` takes it from something.
    operand: bool,
}

/// Writes the expression or statement that `text` begins with, up to `closer`, which is written too; how long it was.
///
/// # Errors
/// What is nested too deep, and names that macros have in Jinja2 alone.
fn expression(text: &str, closer: &str, blocks: &Blocks<'_>, out: &mut String) -> Result<usize> {
    let fresh = |out: &String| Level { product: out.len(), right_side: false, operand: false };
    let mut levels = vec![fresh(out)];
    let mut nesting = Nesting::new();
    let (mut at, mut after_is, mut first) = (0, false, closer == "%}");
    let mut before = ""; // the token before
    while at < text.len() {
        let rest = &text[at..];
        let top = levels.len() - 1;
        let level = &mut levels[top];
        let token = token(rest);
        if top == 0 && rest.strip_prefix(['-', '+']).unwrap_or(rest).starts_with(closer) {
            end_right_side(level, out);
            let len = rest.find(closer).unwrap_or(0) + closer.len();
            out.push_str(&rest[..len]);
            return Ok(at + len);
        }
        at += token.len();
        match token {
            "(" | "[" | "{" => nesting.open()?,
            ")" | "]" | "}" => nesting.close(),
            "," => nesting.next(),
            "and" | "or" | "not" | "in" | "is" | "if" | "else" => nesting.deeper()?,
            _ if token.starts_with(|c: char| is_word(c) || c.is_whitespace() || "\"':".contains(c)) => {}
            _ => nesting.deeper()?,
        }
        let after = rest[token.len()..].trim_start();
        let is_key = after.starts_with('=') && !after.starts_with("==");
        if before != "." && before != "|" && !is_key {
            blocks.refuse_more_arguments(token)?;
        }
        if !token.starts_with(char::is_whitespace) {
            before = token;
        }
        let is_test = std::mem::take(&mut after_is);
        match token {
            _ if first && token.starts_with(is_word) => {
                out.push_str(token); // a statement's name
                *level = fresh(out);
                first = false;
            }
            "%" => {
                end_right_side(level, out);
                out.insert_str(level.product, &format!("{MODULO}("));
                out.push_str(", ");
                (level.right_side, level.operand) = (true, false);
            }
            "*" | "/" | "//" => {
                end_right_side(level, out);
                out.push_str(token);
                level.operand = false;
            }
            "-" | "+" if !level.operand => out.push_str(token),
            "+" | "-" | "~" | "==" | "!=" | "<" | ">" | "<=" | ">=" | "," | ":" | "=" => {
                end_right_side(level, out);
                out.push_str(token);
                *level = fresh(out);
            }
            "(" | "[" | "{" => {
                out.push_str(token);
                level.operand = true;
                levels.push(fresh(out));
            }
            ")" | "]" | "}" => {
                end_right_side(level, out);
                out.push_str(token);
                if top > 0 {
                    levels.pop();
                }
            }
            "and" | "or" | "not" | "in" | "if" | "else" if !is_test => {
                end_right_side(level, out);
                out.push_str(token);
                *level = fresh(out);
            }
            _ if token.starts_with(['"', '\'']) => {
                push_string(token, out);
                level.operand = true;
            }
            _ if token.starts_with(char::is_whitespace) => {
                let begins = level.product == out.len();
                out.push_str(token);
                if begins {
                    level.product = out.len();
                }
                after_is = is_test;
            }
            _ => {
                out.push_str(token);
                level.operand = token != "**" && token != "|" && token != ".";
                after_is = token == "is" || (is_test && token == "not");
            }
        }
    }
    Ok(at)
}

fn end_right_side(level: &mut Level, out: &mut String) {
    if std::mem::take(&mut level.right_side) {
        out.push(')');
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The token that `text` begins with: white space, a string, a word or number, or an operator.
fn token(text: &str) -> &str {
    let first = text.chars().next().unwrap_or_default();
    let len = if first.is_whitespace() {
        text.find(|c: char| !c.is_whitespace()).unwrap_or(text.len())
    } else if is_word(first) {
        let len = text.find(|c| !is_word(c)).unwrap_or(text.len());
        // The sign of a number's exponent is part of it.
        let (word, after) = text.split_at(len);
        let signed = first.is_ascii_digit() && word.ends_with(['e', 'E']) && after.starts_with(['-', '+']);
        if signed { len + 1 + after[1..].find(|c| !is_word(c)).unwrap_or(after.len() - 1) } else { len }
    } else if first == '"' || first == '\'' {
        let mut escaped = false;
        let end = text[1..].find(|c| {
            let ends = c == first && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        end.map_or(text.len(), |end| end + 2)
    } else if ["**", "//", "==", "!=", "<=", ">="].iter().any(|operator| text.starts_with(operator)) {
        2
    } else {
        first.len_utf8()
    };
    &text[..len]
}

/// Writes a string's literal with no escapes but those of the backslash and the quote.
fn push_string(literal: &str, out: &mut String) {
    let quote = &literal[..1];
    let Some(inner) = literal[1..].strip_suffix(quote) else { return out.push_str(literal) };
    out.push_str(quote);
    for c in unescaped(inner).chars() {
        if c == '\\' || quote.starts_with(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out.push_str(quote);
}

/// Python's escapes in a string; those that it does not know keep their backslash.
fn unescaped(inner: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(inner.len()), inner);
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(c) = rest.chars().next() else {
            out.push('\\');
            break;
        };
        let coded = match c {
            'x' => hex(rest, 2),
            'u' => hex(rest, 4),
            'U' => hex(rest, 8),
            '0'..='7' => {
                let len = rest.bytes().take(3).take_while(|b| (b'0'..=b'7').contains(b)).count();
                u32::from_str_radix(&rest[..len], 8).ok().and_then(char::from_u32).map(|c| (c, len))
            }
            _ => None,
        };
        if let Some((c, len)) = coded {
            out.push(c);
            rest = &rest[len..];
            continue;
        }
        let known = [
            ('n', "\n"),
            ('t', "\t"),
            ('r', "\r"),
            ('\\', "\\"),
            ('\'', "'"),
            ('"', "\""),
            ('a', "\x07"),
            ('b', "\x08"),
            ('f', "\x0c"),
            ('v', "\x0b"),
            ('\n', ""),
        ];
        match known.iter().find(|(name, _)| *name == c) {
            Some((_, stands_for)) => out.push_str(stands_for),
            None => out.extend(['\\', c]),
        }
        rest = &rest[c.len_utf8()..];
    }
    out + rest
}

/// The character of `len` hexadecimal digits after a letter, and the length of both.
fn hex(text: &str, len: usize) -> Option<(char, usize)> {
    let digits = text.get(1..=len)?;
    let code = u32::from_str_radix(digits, 16).ok()?;
    Some((char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 1 + len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modulo_becomes_a_call() {
        for (source, expected) in [
            ("{{ a % b }}", "{{ python_modulo(a ,  b )}}"),
            ("{{- -a % b|f(c) == 0 }}", "{{- python_modulo(-a ,  b|f(c) )== 0 }}"),
            ("{{ a * b % c % d + e }}", "{{ python_modulo(python_modulo(a * b ,  c ),  d )+ e }}"),
            ("{% if x != (i % 2 == 0) %}", "{% if x != (python_modulo(i ,  2 )== 0) %}"),
            ("{{ a - b % c }}", "{{ a - python_modulo(b ,  c )}}"),
            ("{{ x if not 1e-5 % 2 else y }}", "{{ x if not python_modulo(1e-5 ,  2 )else y }}"),
            ("{% if i.j % 2 %}", "{% if python_modulo(i.j ,  2 )%}"),
            ("{%-elif i.j % 2-%}", "{%-elif python_modulo(i.j ,  2)-%}"),
            ("{% set x = i.j % 2 %}", "{% set x = python_modulo(i.j ,  2 )%}"),
            ("{% if a -%}%{%- endif %}", "{% if a -%}%{%- endif %}"),
            ("{{ {'a': {'b': 5 % 3}} }}", "{{ {'a': {'b': python_modulo(5 ,  3)}} }}"),
            (
                "{{ '%}' }}{# 5 % 2 #}{% raw %}{{ 5 % 2 }}{% endraw %}",
                "{{ '%}' }}{# 5 % 2 #}{% raw %}{{ 5 % 2 }}{% endraw %}",
            ),
        ] {
            assert_eq!(adapted(source).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn generation_tags_keep_their_whitespace_control() {
        let tags = "a {%- generation -%} b {% endgeneration %} {% generation_x %} {%";
        assert_eq!(adapted(tags).unwrap(), "a {%- with -%} b {% endwith %} {% generation_x %} {%");
        let inert = "{# {% generation %} #}{{ '{% generation %}' }}{% raw %}{% generation %}{%- endraw %}";
        assert_eq!(adapted(inert).unwrap(), inert);
    }

    #[test]
    fn strings_are_spelled_as_python_reads_them() {
        let source = r"{{ '\d\/\x41\u00e9\n\'' }}";
        assert_eq!(adapted(source).unwrap(), "{{ '\\\\d\\\\/A\u{e9}\n\\'' }}");
        assert_eq!(adapted("a\r\nb\rc{{ 'x\r\n' }}").unwrap(), "a\nb\nc{{ 'x\n' }}");
        for unfinished in ["{{ 'a", "{{ a % ", "{% raw %}", "{#", "{", "{{ '\\", "{% if ("] {
            adapted(unfinished).unwrap(); // whatever it is, the engine says so
        }
    }

    #[test]
    fn a_loop_is_not_left_from_inside_a_scope() {
        for inside in ["with x = 1", "generation", "filter upper", "set x", "set x | upper"] {
            let source = format!("{{% for m in [1] %}}{{%- {inside} -%}}{{% break %}}");
            let error = adapted(&source).unwrap_err().to_string();
            let name = tag_name(inside);
            assert!(error.contains(&format!("`break` stands inside `{name}`")), "{error}");
        }
        let fine =
            "{% set x = 1 %}{% with %}{% for m in [1] %}{% set x %}{% endset %}{% if m %}{% continue %}{% endif %}";
        assert_eq!(adapted(fine).unwrap(), fine);
    }
}
