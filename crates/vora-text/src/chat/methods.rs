//! Python's methods of strings, lists and dictionaries, as templates call them.

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Error, State, Value};
use minijinja_contrib::pycompat;

use super::format::{format, format_map};
use super::python::{invalid, is_printable, is_space, spend_text};

/// Calls `value.method(args)`.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match value.kind() {
        ValueKind::String => string_method(state, value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Seq | ValueKind::Iterable => list_method(value, method, args)?,
        ValueKind::Map if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    own.map_or_else(|| pycompat::unknown_method_callback(state, value, method, args), Ok)
}

fn list_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(match method {
        "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let found = value.try_iter()?.position(|item| item == *wanted);
            Some(found.map(Value::from).ok_or_else(|| invalid(format!("{wanted} is not in list")))?)
        }
        _ => None,
    })
}

/// None where the method is left to minijinja's own.
fn string_method(state: &State, said: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let none = || -> Result<(), Error> { from_args(args) };
    let chars_are = |test: &dyn Fn(char) -> bool| -> Result<Option<Value>, Error> {
        none()?;
        Ok(Some(Value::from(!said.is_empty() && said.chars().all(test))))
    };
    let made = |text: String| Ok(Some(Value::from(text)));
    match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<Value>,) = from_args(args)?;
            let chars = chars.filter(|chars| !chars.is_none());
            let strips = |c: char| match &chars {
                Some(chars) => chars.as_str().is_some_and(|chars| chars.contains(c)),
                None => is_space(c),
            };
            Ok(Some(Value::from(match method {
                "strip" => said.trim_matches(strips),
                "lstrip" => said.trim_start_matches(strips),
                _ => said.trim_end_matches(strips),
            })))
        }
        "split" | "rsplit" => {
            let (args, kwargs): (Rest<Value>, Kwargs) = from_args(args)?;
            let arg = |idx: usize, name| -> Result<Option<Value>, Error> {
                Ok(kwargs.get::<Option<Value>>(name)?.or_else(|| args.get(idx).cloned()).filter(|v| !v.is_none()))
            };
            let most = arg(1, "maxsplit")?.map(i64::try_from).transpose()?.and_then(|most| usize::try_from(most).ok());
            let separator = arg(0, "sep")?;
            kwargs.assert_all_used()?;
            let separator = separator.as_ref().map(|sep| sep.as_str().ok_or_else(|| invalid("sep must be a string")));
            let limit = most.map_or(usize::MAX, |most| most.saturating_add(1));
            let parts: Vec<&str> = match (separator.transpose()?, method == "rsplit") {
                (Some(""), _) => return Err(invalid("empty separator")),
                (Some(sep), false) => said.splitn(limit, sep).collect(),
                (Some(sep), true) => {
                    let mut parts: Vec<&str> = said.rsplitn(limit, sep).collect();
                    parts.reverse();
                    parts
                }
                (None, from_end) => words(said, most.unwrap_or(usize::MAX), from_end),
            };
            state.consume_fuel(parts.len() as u64)?;
            Ok(Some(parts.into_iter().map(Value::from).collect()))
        }
        "splitlines" => {
            let (args, kwargs): (Rest<Value>, Kwargs) = from_args(args)?;
            let keep = kwargs.get::<Option<bool>>("keepends")?.or(args.first().map(Value::is_true)).unwrap_or(false);
            kwargs.assert_all_used()?;
            let lines = lines(said, keep);
            state.consume_fuel(lines.len() as u64)?;
            Ok(Some(lines.into_iter().map(Value::from).collect()))
        }
        "partition" | "rpartition" => {
            let (sep,): (&str,) = from_args(args)?;
            let found = if method == "partition" { said.find(sep) } else { said.rfind(sep) };
            let parts = match found {
                Some(at) => [&said[..at], sep, &said[at + sep.len()..]],
                None if method == "partition" => [said, "", ""],
                None => ["", "", said],
            };
            Ok(Some(Value::from(Tuple::from(parts.map(Value::from)))))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Some(Value::from(said.strip_prefix(prefix).unwrap_or(said))))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Some(Value::from(said.strip_suffix(suffix).unwrap_or(said))))
        }
        "startswith" | "endswith" => {
            let (wanted, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let Some((part, _)) = window(said, start, end) else { return Ok(Some(Value::from(false))) };
            let fits =
                |wanted: &str| if method == "startswith" { part.starts_with(wanted) } else { part.ends_with(wanted) };
            let found = match wanted.as_str() {
                Some(wanted) => fits(wanted),
                None if wanted.is_tuple() => wanted.try_iter()?.any(|one| one.as_str().is_some_and(fits)),
                None => return Err(invalid(format!("{method} first arg must be str or a tuple of str"))),
            };
            Ok(Some(Value::from(found)))
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let found = window(said, start, end).and_then(|(part, skipped)| {
                let at = if method.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) };
                Some(skipped + part[..at?].chars().count())
            });
            match found {
                Some(at) => Ok(Some(Value::from(at))),
                None if method.ends_with("find") => Ok(Some(Value::from(-1))),
                None => Err(invalid("substring not found")),
            }
        }
        "count" => {
            let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let count = window(said, start, end).map_or(0, |(part, _)| part.matches(wanted).count());
            Ok(Some(Value::from(count)))
        }
        "format" => made(format(state, said, args)?),
        "format_map" => made(format_map(state, said, args)?),
        "zfill" | "center" | "ljust" | "rjust" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let missing = width.saturating_sub(said.chars().count());
            spend_text(state, missing.saturating_mul(4))?;
            let (fill, zeros) = (fill.unwrap_or(' '), method == "zfill");
            // CPython puts the odd one to the left where both numbers are odd.
            let left = match method {
                "ljust" => 0,
                "center" => missing / 2 + (missing & width & 1),
                _ => missing,
            };
            let pad = |count: usize| String::from_iter(std::iter::repeat_n(if zeros { '0' } else { fill }, count));
            let (sign, digits) = said.split_at(usize::from(zeros && said.starts_with(['-', '+'])));
            made(format!("{sign}{}{digits}{}", pad(left), pad(missing - left)))
        }
        "expandtabs" => {
            let (size,): (Option<usize>,) = from_args(args)?;
            expand_tabs(state, said, size.unwrap_or(8)).map(|text| Some(Value::from(text)))
        }
        "swapcase" => {
            none()?;
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            made(said.chars().map(swap).collect())
        }
        "casefold" => {
            none()?;
            made(said.to_lowercase().replace('ß', "ss"))
        }
        "title" => {
            none()?;
            let mut inside = false;
            let mut title = |c: char| -> String {
                let cased = if inside { c.to_lowercase().collect() } else { c.to_uppercase().collect() };
                inside = c.is_alphabetic();
                cased
            };
            made(said.chars().map(&mut title).collect())
        }
        "istitle" => {
            none()?;
            let (mut inside, mut any, mut is_title) = (false, false, true);
            for c in said.chars() {
                let cased = c.is_uppercase() || c.is_lowercase();
                is_title &= !cased || c.is_lowercase() == inside;
                (inside, any) = (cased, any || cased);
            }
            Ok(Some(Value::from(any && is_title)))
        }
        "isspace" => chars_are(&is_space),
        "isdecimal" => chars_are(&char::is_numeric),
        "isprintable" => {
            none()?;
            Ok(Some(Value::from(said.chars().all(is_printable))))
        }
        "isidentifier" => {
            none()?;
            let starts = said.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
            Ok(Some(Value::from(starts && said.chars().all(|c| c.is_alphanumeric() || c == '_'))))
        }
        "join" => {
            let (values,): (&Value,) = from_args(args)?;
            let mut out = String::new();
            for (idx, value) in values.try_iter()?.enumerate() {
                let Some(text) = value.as_str() else {
                    return Err(invalid(format!("sequence item {idx}: expected str, {} found", value.kind())));
                };
                spend_text(state, said.len() + text.len() + 64)?;
                if idx > 0 {
                    out.push_str(said);
                }
                out.push_str(text);
            }
            made(out)
        }
        _ => Ok(None),
    }
}

/// `text[start:end]` by characters, and how many of them stand before it; none where it begins beyond the end.
fn window(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(&str, usize)> {
    let len = if start.is_some() || end.is_some() { text.chars().count() } else { return Some((text, 0)) };
    let place = |at: i64| usize::try_from(if at < 0 { (at + len as i64).max(0) } else { at }).unwrap_or(usize::MAX);
    let (start, end) = (start.map_or(0, place), end.map_or(len, place).min(len));
    if start > end {
        return None;
    }
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    Some((&text[byte(start)..byte(end)], start))
}

/// The words between white space, at most `most` of them cut off from one end.
fn words(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let (mut words, mut rest) = (Vec::new(), text.trim_matches(is_space));
    while !rest.is_empty() {
        let cut = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = cut.filter(|_| words.len() < most) else {
            words.push(rest);
            break;
        };
        let after = at + rest[at..].chars().next().map_or(0, char::len_utf8);
        if from_end {
            words.push(&rest[after..]);
            rest = rest[..at].trim_end_matches(is_space);
        } else {
            words.push(&rest[..at]);
            rest = rest[after..].trim_start_matches(is_space);
        }
    }
    if from_end {
        words.reverse();
    }
    // What is left whole keeps the white space at its far end.
    if words.len() > most {
        let whole = if from_end { words.first_mut() } else { words.last_mut() };
        if let Some(whole) = whole {
            let at = whole.as_ptr() as usize - text.as_ptr() as usize;
            *whole = if from_end { &text[..at + whole.len()] } else { &text[at..] };
        }
    }
    words
}

/// The lines as `splitlines` cuts them.
pub(super) fn lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end = |c: char| "\n\r\x0b\x0c\x1c\x1d\x1e\u{85}\u{2028}\u{2029}".contains(c);
    let (mut lines, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.find(is_end) {
        let end = if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(0, char::len_utf8) };
        lines.push(&rest[..at + if keep { end } else { 0 }]);
        rest = &rest[at + end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn expand_tabs(state: &State, text: &str, size: usize) -> Result<String, Error> {
    let (mut out, mut column) = (String::new(), 0);
    for c in text.chars() {
        if c == '\t' {
            let spaces = if size == 0 { 0 } else { size - column % size };
            spend_text(state, spaces)?;
            out.extend(std::iter::repeat_n(' ', spaces));
            column += spaces;
        } else {
            out.push(c);
            column = if c == '\n' || c == '\r' { 0 } else { column + 1 };
        }
    }
    Ok(out)
}
