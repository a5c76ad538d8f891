//! Filters and tests that differ from Jinja2's in our engine, or that it lacks.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, State, Value};

use super::json::to_json;
use super::python::{format_filter, invalid, is_space, spend_text, text};

/// Adds them.
pub(super) fn add(environment: &mut minijinja::Environment<'static>) {
    environment.add_filter("tojson", to_json);
    environment.add_filter("format", format_filter);
    environment.add_filter("join", join);
    environment.add_filter("string", text);
    environment.add_filter("int", int);
    environment.add_filter("float", to_float);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("dictsort", dictsort);
    environment.add_filter("indent", indent);
    environment.add_filter("round", round);
    environment.add_filter("trim", trim);
    environment.add_filter("truncate", truncate);
    environment.add_filter("center", center);
    environment.add_filter("wordcount", word_count);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}

/// `join` as a filter: what is no string is printed.
fn join(
    state: &mut State,
    value: &Value,
    joiner: Option<Value>,
    attribute: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let joiner = kwargs.get::<Option<Value>>("d")?.or(joiner);
    let attribute = kwargs.get::<Option<Value>>("attribute")?.or(attribute);
    kwargs.assert_all_used()?;
    let joiner = joiner.map(|joiner| text(state, &joiner)).transpose()?.unwrap_or_default();
    let value = match attribute {
        Some(attribute) => {
            let named = Value::from(Kwargs::from_iter([("attribute", attribute)]));
            state.apply_filter("map", &[value.clone(), named])?
        }
        None => value.clone(),
    };
    let mut out = String::new();
    for (idx, item) in value.try_iter()?.enumerate() {
        let item = text(state, &item)?;
        spend_text(state, joiner.len() + item.len() + 64)?;
        if idx > 0 {
            out.push_str(&joiner);
        }
        out.push_str(&item);
    }
    Ok(out)
}

/// A filter's arguments by place or by name, as Python's functions take them.
pub(super) struct Args {
    pub(super) placed: Rest<Value>,
    pub(super) named: Kwargs,
}

impl Args {
    pub(super) fn get(&self, idx: usize, name: &str) -> Result<Option<Value>, Error> {
        let named = self.named.get::<Option<Value>>(name)?;
        Ok(named.or_else(|| self.placed.get(idx).cloned()))
    }

    fn is_set(&self, idx: usize, name: &str) -> Result<bool, Error> {
        Ok(self.get(idx, name)?.is_some_and(|value| value.is_true()))
    }

    pub(super) fn count(&self, idx: usize, name: &str, default: usize) -> Result<usize, Error> {
        self.get(idx, name)?.filter(|value| !value.is_none()).map_or(Ok(default), usize::try_from)
    }
}

/// What is not a number becomes the default, which is 0 unless given.
fn int(value: &Value, placed: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let args = Args { placed, named };
    let default = args.get(0, "default")?.unwrap_or_else(|| Value::from(0));
    let base = args.count(1, "base", 10)?;
    args.named.assert_all_used()?;
    let cut = |number: f64| number.is_finite().then(|| whole(number as i128));
    let parsed = match value.kind() {
        ValueKind::Bool => Some(Value::from(u8::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => Some(value.clone()),
        ValueKind::Number => cut(f64::try_from(value.clone())?),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default().trim_matches(is_space);
            integer(text, base).map(whole).or_else(|| number(text).and_then(cut))
        }
        _ => None,
    };
    Ok(parsed.unwrap_or(default))
}

fn whole(number: i128) -> Value {
    i64::try_from(number).map_or_else(|_| Value::from(number), Value::from)
}

/// `int(text, base)`.
fn integer(text: &str, base: usize) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_lowercase();
    let prefixed = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find_map(|(prefix, of)| {
        (base == of || base == 0).then(|| Some((lower.strip_prefix(prefix)?.to_owned(), of))).flatten()
    });
    let (digits, base) = prefixed.unwrap_or((lower, if base == 0 { 10 } else { base }));
    let separated = digits.starts_with('_') || digits.ends_with('_') || digits.contains("__");
    let plain = !separated && !digits.starts_with(['-', '+']);
    let radix = u32::try_from(base).ok().filter(|base| (2..=36).contains(base) && plain)?;
    let size = i128::from_str_radix(&digits.replace('_', ""), radix).ok()?;
    Some(if negative { -size } else { size })
}

/// `float(text)`.
fn number(text: &str) -> Option<f64> {
    text.trim_matches(is_space).replace('_', "").parse().ok()
}

/// What is not a number becomes the default, which is 0.0 unless given.
fn to_float(value: &Value, placed: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let args = Args { placed, named };
    let default = args.get(0, "default")?.unwrap_or_else(|| Value::from(0.0));
    args.named.assert_all_used()?;
    let parsed = match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => Some(f64::try_from(value.clone())?),
        ValueKind::String => number(value.as_str().unwrap_or_default()),
        _ => None,
    };
    Ok(parsed.map_or(default, Value::from))
}

fn default(value: &Value, placed: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let args = Args { placed, named };
    let default = args.get(0, "default_value")?.unwrap_or_else(|| Value::from(""));
    let falsy_too = args.is_set(1, "boolean")?;
    args.named.assert_all_used()?;
    Ok(if value.is_undefined() || (falsy_too && !value.is_true()) { default } else { value.clone() })
}

fn dictsort(value: &Value, placed: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let args = Args { placed, named };
    let mut all = Vec::new();
    for (idx, name) in ["case_sensitive", "by", "reverse"].into_iter().enumerate() {
        all.extend(args.get(idx, name)?.map(|value| (name, value)));
    }
    args.named.assert_all_used()?;
    minijinja::filters::dictsort(value, Kwargs::from_iter(all))
}

fn indent(state: &State, said: &str, placed: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let args = Args { placed, named };
    let by = match args.get(0, "width")? {
        Some(width) if width.as_str().is_some() => width.as_str().unwrap_or_default().to_owned(),
        _ => {
            let width = args.count(0, "width", 4)?;
            spend_text(state, width)?;
            " ".repeat(width)
        }
    };
    let (first, blank) = (args.is_set(1, "first")?, args.is_set(2, "blank")?);
    args.named.assert_all_used()?;
    let mut out = String::new();
    for (idx, line) in said.split('\n').enumerate() {
        spend_text(state, by.len() + line.len() + 64)?;
        if idx > 0 {
            out.push('\n');
        }
        if if idx == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&by);
        }
        out.push_str(line);
    }
    Ok(out)
}

fn round(value: &Value, placed: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let args = Args { placed, named };
    let precision = args.get(0, "precision")?.unwrap_or_else(|| Value::from(0));
    let method = args.get(1, "method")?.unwrap_or_else(|| Value::from("common"));
    args.named.assert_all_used()?;
    let scale = 10f64.powi(i32::try_from(precision.clone())?);
    let scaled = f64::try_from(value.clone()).unwrap_or(f64::NAN) * scale;
    match method.as_str() {
        Some("ceil") => Ok(Value::from(scaled.ceil() / scale)),
        Some("floor") => Ok(Value::from(scaled.floor() / scale)),
        Some("common") => {
            let plain = Kwargs::from_iter(std::iter::empty::<(&str, Value)>());
            minijinja::filters::round(value.clone(), i32::try_from(precision).ok(), None, plain)
        }
        _ => Err(invalid("method must be common, ceil or floor")),
    }
}

fn trim(state: &State, value: &Value, chars: Option<String>) -> Result<String, Error> {
    let said = text(state, value)?;
    let strips = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(c));
    Ok(said.trim_matches(strips).to_owned())
}

/// Cut at a word's end where it is longer than `length` and a few more.
fn truncate(said: &str, placed: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let args = Args { placed, named };
    let (length, kill_words) = (args.count(0, "length", 255)?, args.is_set(1, "killwords")?);
    let end = args.get(2, "end")?.map_or("...".to_owned(), |end| end.to_string());
    let leeway = args.count(3, "leeway", 5)?;
    args.named.assert_all_used()?;
    let end_len = end.chars().count();
    if length < end_len {
        return Err(invalid(format!("truncate: a length of {length} is less than that of `{end}`")));
    }
    if said.chars().count() <= length.saturating_add(leeway) {
        return Ok(said.to_owned());
    }
    let cut: String = said.chars().take(length - end_len).collect();
    let cut = if kill_words { cut.as_str() } else { cut.rsplit_once(' ').map_or(cut.as_str(), |(words, _)| words) };
    Ok(format!("{cut}{end}"))
}

fn center(state: &mut State, said: &Value, width: Option<usize>) -> Result<Value, Error> {
    super::methods::call(state, &Value::from(text(state, said)?), "center", &[Value::from(width.unwrap_or(80))])
}

/// Runs of letters, digits and underscores.
fn word_count(text: &str) -> usize {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
}

fn escape(state: &State, value: &Value) -> Result<Value, Error> {
    let mut out = String::new();
    for c in text(state, value)?.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            _ => out.push(c),
        }
    }
    Ok(Value::from(out))
}

/// Strings, lists, mappings and the undefined, but not `none`.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Whatever has a length and items, so strings and mappings too.
fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), Undefined | Seq | Iterable | String | Map)
}
