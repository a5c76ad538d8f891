//! Values as Python prints them, and its `%`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Values are printed down to this depth; Python itself gives up at some thousand.
pub(super) const MAX_DEPTH: usize = 200;

/// `str(value)`.
pub(super) fn text(state: &State, value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut out = String::new();
    if !value.is_undefined() {
        print(state, value, &mut out, 0)?;
    }
    Ok(out)
}

/// `repr(value)`.
pub(super) fn repr(state: &State, value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    print(state, value, &mut out, 0)?;
    Ok(out)
}

/// `ascii(value)`, of a string.
pub(super) fn ascii(state: &State, value: &Value) -> Result<String, Error> {
    let Some(text) = value.as_str() else { return repr(state, value) };
    let mut out = String::new();
    quote(text, true, &mut out);
    Ok(out)
}

fn print(state: &State, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    spend(state, value, depth)?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => match f64::try_from(value.clone()) {
            Ok(number) if !value.is_integer() => out.push_str(&float(number)),
            _ => out.push_str(&value.to_string()),
        },
        ValueKind::String => quote(value.as_str().unwrap_or_default(), false, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ('(', ")") } else { ('[', "]") };
            out.push(open);
            let mut len = 0;
            for item in value.try_iter()? {
                if len > 0 {
                    out.push_str(", ");
                }
                print(state, &item, out, depth + 1)?;
                len += 1;
            }
            out.push_str(if value.is_tuple() && len == 1 { ",)" } else { close });
        }
        ValueKind::Map => {
            out.push('{');
            for (idx, key) in value.try_iter()?.enumerate() {
                if idx > 0 {
                    out.push_str(", ");
                }
                print(state, &key, out, depth + 1)?;
                out.push_str(": ");
                print(state, &value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// Pays for printing a value before it is printed: what is small can hold what is not.
pub(super) fn spend(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid(format!("a value of more than {MAX_DEPTH} lists in each other cannot be printed")));
    }
    state.consume_fuel(1 + value.as_str().map_or(0, |text| text.len() as u64 / 64))
}

/// Pays for text that is about to be made.
pub(super) fn spend_text(state: &State, len: usize) -> Result<(), Error> {
    state.consume_fuel(len as u64 / 64)
}

pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// A float as Python prints it: the shortest digits that are read as the same, from 1e16 on and below 1e-4 with an
/// exponent.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let digits = format!("{number:e}");
    let (mantissa, exponent) = digits.split_once('e').unwrap_or((&digits, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..16).contains(&exponent) {
        return with_exponent(mantissa, exponent, 'e');
    }
    let fixed = number.to_string();
    if fixed.contains('.') { fixed } else { fixed + ".0" }
}

/// C's exponent: a sign and at least two digits.
fn with_exponent(mantissa: &str, exponent: i32, e: char) -> String {
    format!("{mantissa}{e}{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// The digits of a number with so many after the point, and the power of ten that they stand for.
fn scientific(number: f64, precision: usize) -> (String, i32) {
    let text = format!("{number:.precision$e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    (mantissa.to_owned(), exponent.parse().unwrap_or(0))
}

/// A string's literal: in single quotes unless only those are in it.
fn quote(text: &str, ascii: bool, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        let code = u32::from(c);
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if c == mark => out.extend(['\\', c]),
            _ if is_printable(c) && (c.is_ascii() || !ascii) => out.push(c),
            _ => {
                let _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(mark);
}

/// Whether Python shows a character as it is.
pub(super) fn is_printable(c: char) -> bool {
    let hidden = ['\u{ad}', '\u{61c}', '\u{feff}'].contains(&c)
        || ('\u{200b}'..='\u{200f}').contains(&c)
        || ('\u{202a}'..='\u{202e}').contains(&c)
        || ('\u{2060}'..='\u{206f}').contains(&c)
        || ('\u{e000}'..='\u{f8ff}').contains(&c);
    c == ' ' || !(c.is_control() || c.is_whitespace() || hidden)
}

/// Python's white space: Unicode's, and four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `left % right`: a string is a form to fill in, numbers are divided with the divisor's sign.
pub(super) fn modulo(state: &State, left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(form) = left.as_str() {
        return format(state, form, right).map(Value::from);
    }
    let number = |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool);
    if !number(left) || !number(right) {
        return Err(invalid(format!(
            "`%` takes numbers, or a string on its left, not {} and {}",
            left.kind(),
            right.kind()
        )));
    }
    let whole = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        _ => value.is_integer().then(|| i128::try_from(value.clone()).ok()).flatten(),
    };
    if let (Some(a), Some(b)) = (whole(left), whole(right)) {
        let rest = a.checked_rem(b).ok_or_else(|| invalid("integer modulo by zero"))?;
        let rest = if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest };
        return Ok(i64::try_from(rest).map_or_else(|_| Value::from(rest), Value::from));
    }
    let (a, b) = (f64::try_from(left.clone())?, f64::try_from(right.clone())?);
    if b == 0.0 {
        return Err(invalid("float modulo by zero"));
    }
    let rest = a % b;
    Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }))
}

/// The filter `format`: `form % args`, by name where there are names.
pub(super) fn format_filter(state: &State, form: &str, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let names: Vec<&str> = named.args().collect();
    if names.is_empty() {
        return format(state, form, &Value::from(Tuple::new(args.0)));
    }
    let pairs = names.iter().map(|name| Ok((Value::from(*name), named.get::<Value>(name)?)));
    format(state, form, &Value::from_pairs(pairs.collect::<Result<Vec<_>, Error>>()?))
}

/// How one value is written.
#[derive(Default)]
pub(super) struct Field {
    left: bool,
    zero: bool,
    plus: bool,
    space: bool,
    alternate: bool,
    width: usize,
    precision: Option<usize>,
}

/// No field is wider.
pub(super) const MAX_WIDTH: usize = 1 << 16;

/// `form % args`: one value, several in a tuple, or a dictionary's by name.
fn format(state: &State, form: &str, args: &Value) -> Result<String, Error> {
    let values: Vec<Value> = if args.is_tuple() { args.try_iter()?.collect() } else { vec![args.clone()] };
    let mut values = values.iter();
    let (mut out, mut chars) = (String::new(), form.chars().peekable());
    let too_few = || invalid("not enough arguments for format string");
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut value = None;
        if chars.next_if_eq(&'(').is_some() {
            if args.kind() != ValueKind::Map {
                return Err(invalid("format requires a mapping"));
            }
            let name: String = chars.by_ref().take_while(|c| *c != ')').collect();
            let found = args.get_item(&Value::from(name.as_str()))?;
            if found.is_undefined() {
                return Err(invalid(format!("the format string's `{name}` is not among the arguments")));
            }
            value = Some(found);
        }
        let mut field = Field::default();
        while let Some(flag) = chars.next_if(|c| "-+ #0".contains(*c)) {
            match flag {
                '-' => field.left = true,
                '+' => field.plus = true,
                ' ' => field.space = true,
                '#' => field.alternate = true,
                _ => field.zero = true,
            }
        }
        let mut size = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>| -> Result<usize, Error> {
            if chars.next_if_eq(&'*').is_some() {
                return values.next().and_then(Value::as_usize).ok_or_else(|| invalid("* wants int"));
            }
            let mut digits = String::new();
            while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                digits.push(digit);
            }
            Ok(digits.parse().unwrap_or(if digits.is_empty() { 0 } else { usize::MAX }))
        };
        field.width = size(&mut chars)?;
        if chars.next_if_eq(&'.').is_some() {
            field.precision = Some(size(&mut chars)?);
        }
        if field.width.max(field.precision.unwrap_or(0)) > MAX_WIDTH {
            return Err(invalid(format!("a field of a format string is at most {MAX_WIDTH} wide")));
        }
        spend_text(state, field.width + field.precision.unwrap_or(0))?;
        while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
        let conversion = chars.next().ok_or_else(|| invalid("incomplete format"))?;
        if conversion == '%' {
            out.push('%');
            continue;
        }
        let value = match value {
            Some(value) => value,
            None => values.next().ok_or_else(too_few)?.clone(),
        };
        out.push_str(&field.fill(state, conversion, &value)?);
    }
    if args.kind() != ValueKind::Map && values.next().is_some() {
        return Err(invalid("not all arguments converted during string formatting"));
    }
    Ok(out)
}

impl Field {
    /// For a number of such digits.
    pub(super) fn of_digits(precision: Option<usize>, alternate: bool) -> Self {
        Self { precision, alternate, ..Self::default() }
    }

    fn fill(&self, state: &State, conversion: char, value: &Value) -> Result<String, Error> {
        let number = || match value.kind() {
            ValueKind::Bool => Ok(f64::from(u8::from(value.is_true()))),
            ValueKind::Number => f64::try_from(value.clone()),
            kind => Err(invalid(format!("%{conversion} format: a number is required, not {kind}"))),
        };
        let whole = |may_cut: bool| match value.kind() {
            ValueKind::Number if value.is_integer() => i128::try_from(value.clone()),
            ValueKind::Number if !may_cut => Err(invalid(format!("%{conversion} format: an integer is required"))),
            _ => number().map(|number| number as i128),
        };
        let cut = |text: String| match self.precision {
            Some(precision) => text.chars().take(precision).collect(),
            None => text,
        };
        let least = self.precision.unwrap_or(0);
        let digits = |text: String| format!("{text:0>least$}");
        Ok(match conversion {
            's' => self.pad_text(&cut(text(state, value)?)),
            'r' => self.pad_text(&cut(repr(state, value)?)),
            'a' => self.pad_text(&cut(ascii(state, value)?)),
            'c' => {
                let code = value.as_usize().and_then(|code| char::from_u32(u32::try_from(code).ok()?));
                let mut chars = value.as_str().unwrap_or_default().chars();
                let c = code.or_else(|| chars.next()).filter(|_| chars.next().is_none());
                self.pad_text(&c.ok_or_else(|| invalid("%c requires int or char"))?.to_string())
            }
            'd' | 'i' | 'u' => {
                let number = whole(true)?;
                self.pad_number(number < 0, "", &digits(number.unsigned_abs().to_string()))
            }
            'x' | 'X' | 'o' => {
                let number = whole(false)?;
                let size = number.unsigned_abs();
                let (mark, text) = match conversion {
                    'x' => ("0x", format!("{size:x}")),
                    'X' => ("0X", format!("{size:X}")),
                    _ => ("0o", format!("{size:o}")),
                };
                self.pad_number(number < 0, if self.alternate { mark } else { "" }, &digits(text))
            }
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                let number = number()?;
                let text = self.float(number.abs(), conversion);
                let text = if conversion.is_uppercase() { text.to_uppercase() } else { text };
                self.pad_number(number.is_sign_negative() && !number.is_nan(), "", &text)
            }
            other => return Err(invalid(format!("unsupported format character `{other}`"))),
        })
    }

    /// A number that is not negative.
    pub(super) fn float(&self, number: f64, conversion: char) -> String {
        if !number.is_finite() {
            return float(number);
        }
        let precision = self.precision.unwrap_or(6);
        match conversion.to_ascii_lowercase() {
            'f' => format!("{number:.precision$}"),
            'e' => {
                let (mantissa, exponent) = scientific(number, precision);
                with_exponent(&mantissa, exponent, 'e')
            }
            _ => self.general(number, precision.max(1)),
        }
    }

    /// `%g` of a number that is not negative; from ten to the power of `fixed` on it has an exponent.
    pub(super) fn general(&self, number: f64, fixed: usize) -> String {
        let precision = self.precision.unwrap_or(6).max(1);
        let (mantissa, exponent) = scientific(number, precision - 1);
        let short = |text: &str| match text.contains('.') && !self.alternate {
            true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
            false => text.to_owned(),
        };
        if exponent < -4 || exponent >= fixed as i32 {
            return with_exponent(&short(&mantissa), exponent, 'e');
        }
        let decimals = (precision as i32 - 1 - exponent).max(0) as usize;
        short(&format!("{number:.decimals$}"))
    }

    fn pad_text(&self, text: &str) -> String {
        let width = self.width;
        if self.left { format!("{text:<width$}") } else { format!("{text:>width$}") }
    }

    fn pad_number(&self, negative: bool, mark: &str, digits: &str) -> String {
        let sign = match (negative, self.plus, self.space) {
            (true, ..) => "-",
            (_, true, _) => "+",
            (.., true) => " ",
            _ => "",
        };
        if self.zero && !self.left {
            let width = self.width.saturating_sub(sign.len() + mark.len());
            return format!("{sign}{mark}{digits:0>width$}");
        }
        self.pad_text(&format!("{sign}{mark}{digits}"))
    }
}
