//! `str.format` of Python, as Jinja2's sandbox allows it: fields by place and by name, attributes and items of them,
//! conversions, and the format of strings and numbers.

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Error, State, Value};

use super::python::{Field, MAX_WIDTH, ascii, float, invalid, repr, spend_text, text};

/// `form.format(args)`.
pub(super) fn format(state: &State, form: &str, args: &[Value]) -> Result<String, Error> {
    let (placed, named): (Rest<Value>, Kwargs) = from_args(args)?;
    let named = Value::from_pairs(
        named.args().map(|name| Ok((name, named.get::<Value>(name)?))).collect::<Result<Vec<_>, Error>>()?,
    );
    Formatter { state, placed: &placed, named: &named, counts: None }.fill(form, 2)
}

/// `form.format_map(mapping)`.
pub(super) fn format_map(state: &State, form: &str, args: &[Value]) -> Result<String, Error> {
    let (named,): (&Value,) = from_args(args)?;
    Formatter { state, placed: &[], named, counts: None }.fill(form, 2)
}

struct Formatter<'a> {
    state: &'a State<'a, 'a>,
    placed: &'a [Value],
    named: &'a Value,
    /// The place of the next `{}`; usize::MAX where fields are numbered by hand.
    counts: Option<usize>,
}

impl Formatter<'_> {
    /// `form` with its fields filled in; a field's format may have fields too, `depth` says how often.
    fn fill(&mut self, form: &str, depth: usize) -> Result<String, Error> {
        if depth == 0 {
            return Err(invalid("max string recursion exceeded"));
        }
        let (mut out, mut rest) = (String::new(), form);
        while let Some(at) = rest.find(['{', '}']) {
            out.push_str(&rest[..at]);
            let (brace, after) = rest[at..].split_at(1);
            if let Some(escaped) = after.strip_prefix(brace) {
                out.push_str(brace);
                rest = escaped;
                continue;
            }
            if brace == "}" {
                return Err(invalid("single `}` encountered in format string"));
            }
            let end = field_end(after).ok_or_else(|| invalid("expected `}` before end of string"))?;
            let written = self.field(&after[..end], depth)?;
            spend_text(self.state, written.len() + 64)?;
            out.push_str(&written);
            rest = &after[end + 1..];
        }
        out.push_str(rest);
        Ok(out)
    }

    /// What stands for `name!conversion:format`.
    fn field(&mut self, field: &str, depth: usize) -> Result<String, Error> {
        let (name, format) = match field.find([':', '!']).map(|at| field.split_at(at)) {
            Some((name, rest)) => (name, rest),
            None => (field, ""),
        };
        let value = self.value(name)?;
        let (value, format) = match format.strip_prefix('!') {
            None => (value, format),
            Some(rest) => {
                let mut chars = rest.chars();
                let converted = match chars.next() {
                    Some('s') => text(self.state, &value)?,
                    Some('r') => repr(self.state, &value)?,
                    Some('a') => ascii(self.state, &value)?,
                    other => return Err(invalid(format!("unknown conversion {other:?} in a format string"))),
                };
                let format = chars.as_str();
                if !format.is_empty() && !format.starts_with(':') {
                    return Err(invalid("expected `:` after conversion specifier"));
                }
                (Value::from(converted), format)
            }
        };
        let format = self.fill(format.strip_prefix(':').unwrap_or(""), depth - 1);
        let format = if field.contains(':') { format? } else { String::new() };
        Spec::parse(&format)?.write(self.state, &value)
    }

    /// The argument that `name` begins with, and the attributes and items of it that follow.
    fn value(&mut self, name: &str) -> Result<Value, Error> {
        let first_len = name.find(['.', '[']).unwrap_or(name.len());
        let (first, mut rest) = name.split_at(first_len);
        let by_hand = first.bytes().all(|byte| byte.is_ascii_digit());
        let mut value = if by_hand {
            let place = if first.is_empty() {
                self.counts.filter(|count| *count != usize::MAX).or(self.counts.is_none().then_some(0))
            } else {
                first.parse().ok().filter(|_| self.counts.is_none_or(|count| count == usize::MAX))
            };
            let place = place.ok_or_else(|| invalid("a format string numbers its fields all by hand, or none"))?;
            self.counts = Some(if first.is_empty() { place + 1 } else { usize::MAX });
            self.placed.get(place).cloned().ok_or_else(|| invalid("replacement index out of range"))?
        } else {
            let found = self.named.get_item(&Value::from(first))?;
            if found.is_undefined() {
                return Err(invalid(format!("the format string's `{first}` is not among the arguments")));
            }
            found
        };
        while !rest.is_empty() {
            let (key, after) = if let Some(attribute) = rest.strip_prefix('.') {
                let len = attribute.find(['.', '[']).unwrap_or(attribute.len());
                (Value::from(&attribute[..len]), &attribute[len..])
            } else {
                let inside = rest.strip_prefix('[').and_then(|item| item.split_once(']'));
                let (item, after) = inside.ok_or_else(|| invalid("missing `]` in format string"))?;
                (item.parse::<u32>().map_or_else(|_| Value::from(item), Value::from), after)
            };
            (value, rest) = (value.get_item(&key)?, after);
        }
        Ok(value)
    }
}

/// Where a field ends that begins before `text`.
fn field_end(text: &str) -> Option<usize> {
    let mut open = 1;
    text.char_indices().find_map(|(at, c)| {
        match c {
            '{' => open += 1,
            '}' => open -= 1,
            _ => {}
        }
        (open == 0).then_some(at)
    })
}

/// `[[fill]align][sign][#][0][width][grouping][.precision][type]`
#[derive(Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    conversion: Option<char>,
    is_empty: bool,
}

impl Spec {
    fn parse(format: &str) -> Result<Self, Error> {
        let bad = || invalid(format!("format specifier `{format}` is not supported"));
        let mut chars: Vec<char> = format.chars().rev().collect(); // from its end
        let mut spec = Self { is_empty: chars.is_empty(), ..Self::default() };
        let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
        let second = chars.len().checked_sub(2).and_then(|at| chars.get(at));
        if is_align(second) {
            (spec.fill, spec.align) = (chars.pop(), chars.pop());
        } else if is_align(chars.last()) {
            spec.align = chars.pop();
        }
        spec.sign = chars.pop_if(|c| "+- ".contains(*c));
        spec.alternate = chars.pop_if(|c| *c == '#').is_some();
        spec.zero = chars.pop_if(|c| *c == '0').is_some();
        let number = |chars: &mut Vec<char>| {
            let mut digits = String::new();
            while let Some(digit) = chars.pop_if(|c| c.is_ascii_digit()) {
                digits.push(digit);
            }
            (!digits.is_empty()).then(|| digits.parse().unwrap_or(usize::MAX))
        };
        spec.width = number(&mut chars).unwrap_or(0);
        spec.grouping = chars.pop_if(|c| ",_".contains(*c));
        if chars.pop_if(|c| *c == '.').is_some() {
            spec.precision = Some(number(&mut chars).ok_or_else(bad)?);
        }
        spec.conversion = chars.pop();
        if spec.width.max(spec.precision.unwrap_or(0)) > MAX_WIDTH {
            return Err(invalid(format!("a field of a format string is at most {MAX_WIDTH} wide")));
        }
        // Zeros before digits in groups make groups too.
        if !chars.is_empty() || spec.grouping.is_some() && spec.zero {
            return Err(bad());
        }
        Ok(spec)
    }

    fn write(&self, state: &State, value: &Value) -> Result<String, Error> {
        if self.is_empty {
            return text(state, value);
        }
        spend_text(state, self.width + self.precision.unwrap_or(0))?;
        match value.kind() {
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Bool => self.number(&Value::from(u8::from(value.is_true()))),
            ValueKind::Number => self.number(value),
            kind => Err(invalid(format!("unsupported format string passed to {kind}"))),
        }
    }

    fn string(&self, said: &str) -> Result<String, Error> {
        let is_numbers = self.sign.is_some() || self.alternate || self.grouping.is_some() || self.align == Some('=');
        if is_numbers || !matches!(self.conversion, None | Some('s')) {
            return Err(invalid("the format of a string is one of numbers"));
        }
        let cut: String = said.chars().take(self.precision.unwrap_or(usize::MAX)).collect();
        Ok(self.pad("", &cut, self.align.unwrap_or('<')))
    }

    fn number(&self, value: &Value) -> Result<String, Error> {
        let unknown =
            |c: char| invalid(format!("format code `{c}` is not supported for {value}, a number of this type"));
        let whole = value.is_integer().then(|| i128::try_from(value.clone())).transpose()?;
        let (negative, mark, digits) = match (whole, self.conversion) {
            (Some(number), None | Some('d' | 'b' | 'o' | 'x' | 'X')) if self.precision.is_none() => {
                let size = number.unsigned_abs();
                let (mark, digits) = match self.conversion.unwrap_or('d') {
                    'b' => ("0b", format!("{size:b}")),
                    'o' => ("0o", format!("{size:o}")),
                    'x' => ("0x", format!("{size:x}")),
                    'X' => ("0X", format!("{size:X}")),
                    _ => ("", size.to_string()),
                };
                let group = if mark.is_empty() { 3 } else { 4 };
                (number < 0, if self.alternate { mark } else { "" }, self.grouped(&digits, group))
            }
            (_, Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%')) | (None, None) => {
                let number = f64::try_from(value.clone())?;
                (number.is_sign_negative() && !number.is_nan(), "", self.grouped(&self.float(number.abs()), 3))
            }
            (_, conversion) => return Err(unknown(conversion.unwrap_or('.'))),
        };
        let sign = match self.sign {
            _ if negative => "-",
            Some('+') => "+",
            Some(' ') => " ",
            _ => "",
        };
        let align = self.align.unwrap_or(if self.zero { '=' } else { '>' });
        Ok(self.pad(&format!("{sign}{mark}"), &digits, align))
    }

    /// A number that is not negative.
    fn float(&self, number: f64) -> String {
        if !number.is_finite() {
            return float(number);
        }
        let field = |precision| Field::of_digits(precision, self.alternate);
        match (self.conversion, self.precision) {
            (Some('%'), precision) => field(precision).float(number * 100.0, 'f') + "%",
            (Some(conversion), precision) => {
                let text = field(precision).float(number, conversion);
                if conversion.is_uppercase() { text.to_uppercase() } else { text }
            }
            (None, None) => float(number),
            // As `g`, but never without a digit after the point, and with an exponent one digit earlier.
            (None, Some(precision)) => {
                let text = field(Some(precision)).general(number, precision.max(1) - 1);
                if text.contains(['.', 'e']) { text } else { text + ".0" }
            }
        }
    }

    /// Digits before the point in groups.
    fn grouped(&self, digits: &str, group: usize) -> String {
        let Some(mark) = self.grouping else { return digits.to_owned() };
        let len = digits.find(|c: char| !c.is_ascii_alphanumeric() || c == 'e' && group == 3).unwrap_or(digits.len());
        let mut out = String::new();
        for (idx, c) in digits[..len].chars().enumerate() {
            if idx > 0 && (len - idx).is_multiple_of(group) {
                out.push(mark);
            }
            out.push(c);
        }
        out + &digits[len..]
    }

    fn pad(&self, sign: &str, text: &str, align: char) -> String {
        let missing = self.width.saturating_sub(sign.chars().count() + text.chars().count());
        let fill = self.fill.unwrap_or(if self.zero { '0' } else { ' ' });
        let before = match align {
            '<' => 0,
            '^' => missing / 2,
            _ => missing,
        };
        let pad = |count: usize| String::from_iter(std::iter::repeat_n(fill, count));
        match align {
            '=' => format!("{sign}{}{text}", pad(missing)),
            _ => format!("{}{sign}{text}{}", pad(before), pad(missing - before)),
        }
    }
}
