//! `tojson` as HF's templates have it: Python's `json.dumps`, without Jinja's HTML escapes.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, State, Value};

use super::python::{float, invalid, spend};

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`, by place or by name.
pub(super) fn to_json(state: &State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let arg = |idx: usize, name: &str| -> Result<Option<Value>, Error> {
        let named = kwargs.get::<Option<Value>>(name)?;
        Ok(named.or_else(|| args.get(idx).cloned()).filter(|value| !value.is_none()))
    };
    let is_set = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let ascii = is_set(arg(0, "ensure_ascii")?);
    let indent = match arg(1, "indent")? {
        None => None,
        Some(indent) if indent.as_str().is_some() => indent.as_str().map(str::to_owned),
        Some(indent) if indent.kind() == ValueKind::Bool => Some(" ".repeat(usize::from(indent.is_true()))),
        Some(indent) => Some(" ".repeat(indent.as_usize().unwrap_or(0).min(MAX_INDENT))),
    };
    let separators = arg(2, "separators")?.map(|both| both.try_iter().map(Vec::from_iter)).transpose()?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.to_string(), key.to_string()),
        Some(_) => return Err(invalid("tojson: separators are two strings")),
    };
    let sorted = is_set(arg(3, "sort_keys")?);
    kwargs.assert_all_used()?;
    let mut writer = Writer { state, out: String::new(), ascii, indent, item, key, sorted };
    writer.write(value, 0)?;
    Ok(writer.out)
}

/// No indentation is wider.
const MAX_INDENT: usize = 64;

struct Writer<'a> {
    state: &'a State<'a, 'a>,
    out: String,
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
}

impl Writer<'_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        spend(self.state, value, depth)?;
        match value.kind() {
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut empty = true;
                for item in value.try_iter()? {
                    self.next(empty, depth + 1);
                    self.write(&item, depth + 1)?;
                    empty = false;
                }
                self.close(empty, depth, ']');
            }
            ValueKind::Map => {
                self.out.push('{');
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                for (idx, key) in keys.iter().enumerate() {
                    self.next(idx == 0, depth + 1);
                    match scalar(key) {
                        Some(text) => self.string(&text),
                        None => self.string(key.as_str().ok_or_else(|| unfit(key))?),
                    }
                    self.out.push_str(&self.key);
                    self.write(&value.get_item(key)?, depth + 1)?;
                }
                self.close(keys.is_empty(), depth, '}');
            }
            _ => self.out.push_str(&scalar(value).ok_or_else(|| unfit(value))?),
        }
        Ok(())
    }

    fn next(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.item);
        }
        self.new_line(depth);
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            let short = match c {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                '\x08' => "\\b",
                '\x0c' => "\\f",
                _ if c < ' ' || (self.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                    continue;
                }
                _ => {
                    self.out.push(c);
                    continue;
                }
            };
            self.out.push_str(short);
        }
        self.out.push('"');
    }
}

/// What is neither a string nor a container, as JSON.
fn scalar(value: &Value) -> Option<String> {
    Some(match value.kind() {
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => value.is_true().to_string(),
        ValueKind::Number if value.is_integer() => value.to_string(),
        ValueKind::Number => match f64::try_from(value.clone()).ok()? {
            number if number.is_nan() => "NaN".to_owned(),
            number if number.is_infinite() => if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
            number => float(number),
        },
        _ => return None,
    })
}

fn unfit(value: &Value) -> Error {
    invalid(format!("tojson: a value of type {} has no form in JSON", value.kind()))
}
