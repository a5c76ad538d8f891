//! Jinja2's filters of text that our engine lacks: `urlencode`, `striptags`, `wordwrap`.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, State, Value};

use super::filters::Args;
use super::methods::lines;
use super::python::{invalid, is_space, spend_text, text};

/// Adds them.
pub(super) fn add(environment: &mut minijinja::Environment<'static>) {
    environment.add_filter("urlencode", url_encode);
    environment.add_filter("striptags", strip_tags);
    environment.add_filter("wordwrap", word_wrap);
}

/// A text as a part of a URL's path; a dictionary, or a list of pairs, as its query.
fn url_encode(state: &State, value: &Value) -> Result<String, Error> {
    let pairs: Vec<(Value, Value)> = match value.kind() {
        ValueKind::Map => {
            value.try_iter()?.map(|key| Ok((key.clone(), value.get_item(&key)?))).collect::<Result<_, Error>>()?
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let pair = |pair: Value| match &pair.try_iter()?.collect::<Vec<_>>()[..] {
                [key, value] => Ok((key.clone(), value.clone())),
                other => Err(invalid(format!("urlencode takes pairs, not {} values", other.len()))),
            };
            value.try_iter()?.map(pair).collect::<Result<_, Error>>()?
        }
        _ => return Ok(quoted(&text(state, value)?, "/")),
    };
    let mut out = Vec::with_capacity(pairs.len());
    for (key, value) in pairs {
        let pair = [text(state, &key)?, text(state, &value)?].map(|part| quoted(&part, "").replace("%20", "+"));
        spend_text(state, pair[0].len() + pair[1].len() + 64)?;
        out.push(pair.join("="));
    }
    Ok(out.join("&"))
}

/// `urllib.parse.quote(text, safe)`.
fn quoted(text: &str, safe: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || safe.as_bytes().contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// What is left of markup without tags and comments, in single spaces, with its references read.
fn strip_tags(state: &State, value: &Value) -> Result<String, Error> {
    let said = text(state, value)?;
    let (mut out, mut rest) = (String::with_capacity(said.len()), said.as_str());
    while let Some(start) = rest.find('<') {
        let tag = &rest[start..];
        let end = match tag.strip_prefix("<!--") {
            Some(comment) => comment.find("-->").map(|end| end + 7),
            None => tag.find('>').map(|end| end + 1),
        };
        let Some(end) = end else { break };
        out.push_str(&rest[..start]);
        rest = &tag[end..];
    }
    out.push_str(rest);
    unescaped(&out.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" "))
}

/// The names of U+00A0 and what follows it, which are read without a semicolon too.
const LATIN: &str = "nbsp iexcl cent pound curren yen brvbar sect uml copy ordf laquo not shy reg macr deg plusmn sup2 sup3 \
    acute micro para middot cedil sup1 ordm raquo frac14 frac12 frac34 iquest Agrave Aacute Acirc Atilde Auml Aring AElig \
    Ccedil Egrave Eacute Ecirc Euml Igrave Iacute Icirc Iuml ETH Ntilde Ograve Oacute Ocirc Otilde Ouml times Oslash Ugrave \
    Uacute Ucirc Uuml Yacute THORN szlig agrave aacute acirc atilde auml aring aelig ccedil egrave eacute ecirc euml igrave \
    iacute icirc iuml eth ntilde ograve oacute ocirc otilde ouml divide oslash ugrave uacute ucirc uuml yacute thorn yuml";

/// Names for ASCII, and a second spelling of two others.
const OTHERS: [(&str, char); 10] = [
    ("amp", '&'),
    ("AMP", '&'),
    ("lt", '<'),
    ("LT", '<'),
    ("gt", '>'),
    ("GT", '>'),
    ("quot", '"'),
    ("QUOT", '"'),
    ("COPY", '\u{a9}'),
    ("REG", '\u{ae}'),
];

/// `html.unescape(text)`, as far as names of Latin-1 go.
fn unescaped(text: &str) -> Result<String, Error> {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let len = match rest[1..].strip_prefix('#') {
            Some(number) => numbered(number, &mut out)?.map(|len| len + 2),
            None => named(&rest[1..], &mut out)?.map(|len| len + 1),
        };
        if len.is_none() {
            out.push('&');
        }
        rest = &rest[len.unwrap_or(1)..];
    }
    Ok(out + rest)
}

/// Reads `65;` or `x41;` of a reference by number; how long it is.
fn numbered(reference: &str, out: &mut String) -> Result<Option<usize>, Error> {
    let hexadecimal = reference.strip_prefix(['x', 'X']);
    let (digits, radix) = hexadecimal.map_or((reference, 10), |digits| (digits, 16));
    let len = digits.find(|c: char| !c.is_digit(radix)).unwrap_or(digits.len());
    if len == 0 {
        return Ok(None);
    }
    let code = u32::from_str_radix(&digits[..len], radix).unwrap_or(u32::MAX);
    let is_plain = matches!(code, 0x09 | 0x0a | 0x0c | 0x20..=0x7e | 0xa0..) && code & 0xfffe != 0xfffe;
    let c = match char::from_u32(code) {
        None | Some('\0') => char::REPLACEMENT_CHARACTER,
        Some(c) if is_plain && !('\u{fdd0}'..='\u{fdef}').contains(&c) => c,
        Some(_) => {
            return Err(invalid(format!("striptags: the reference `&#{reference:.8}` stands for no plain character")));
        }
    };
    out.push(c);
    let end = usize::from(digits[len..].starts_with(';'));
    Ok(Some(usize::from(radix == 16) + len + end))
}

/// Reads `amp;` of a reference by name; how long it is.
fn named(reference: &str, out: &mut String) -> Result<Option<usize>, Error> {
    let latin = LATIN.split(' ').zip('\u{a0}'..);
    let known = latin.chain(OTHERS).filter(|(name, _)| reference.starts_with(name)).max_by_key(|(name, _)| name.len());
    let word = &reference[..reference.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(reference.len())];
    let is_whole = reference[word.len()..].starts_with(';') && !word.is_empty();
    match known {
        Some((name, c)) if name == word || !is_whole => {
            out.push(c);
            Ok(Some(name.len() + usize::from(name == word && is_whole)))
        }
        Some(_) | None if is_whole && word == "apos" => {
            out.push('\'');
            Ok(Some(5))
        }
        _ if is_whole => Err(invalid(format!(
            "striptags: the character reference `&{word};` is not supported, those of Latin-1 are"
        ))),
        _ => Ok(None),
    }
}

/// Lines of at most `width` characters, as Python's `textwrap` breaks them.
fn word_wrap(state: &State, said: &str, placed: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let args = Args { placed, named };
    let width = args.count(0, "width", 79)?;
    let break_long_words = args.get(1, "break_long_words")?.is_none_or(|value| value.is_true());
    let joiner = args.get(2, "wrapstring")?.filter(|value| !value.is_none());
    let joiner = joiner.map_or_else(|| Ok("\n".to_owned()), |joiner| text(state, &joiner))?;
    let break_on_hyphens = args.get(3, "break_on_hyphens")?.is_none_or(|value| value.is_true());
    args.named.assert_all_used()?;
    if width == 0 {
        return Err(invalid("wordwrap: a width of 0, it must be at least 1"));
    }
    let wrap = Wrap { width, break_long_words, break_on_hyphens };
    let mut out = Vec::new();
    for line in lines(said, false) {
        let paragraph = wrap.lines(&line.chars().collect::<Vec<_>>());
        spend_text(state, line.len() + (paragraph.len() + 1) * (joiner.len() + 64))?;
        out.push(paragraph.join(&joiner));
    }
    Ok(out.join(&joiner))
}

struct Wrap {
    width: usize,
    break_long_words: bool,
    break_on_hyphens: bool,
}

impl Wrap {
    fn lines(&self, text: &[char]) -> Vec<String> {
        let is_blank = |chunk: &&[char]| chunk.iter().all(|c| is_space(*c));
        let mut chunks = self.chunks(text);
        chunks.reverse();
        let mut lines: Vec<String> = Vec::new();
        while !chunks.is_empty() {
            let (mut line, mut len) = (Vec::new(), 0);
            if !lines.is_empty() {
                chunks.pop_if(|chunk| is_blank(&&**chunk));
            }
            while let Some(chunk) = chunks.pop_if(|chunk| len + chunk.len() <= self.width) {
                len += chunk.len();
                line.push(chunk);
            }
            if let Some(long) = chunks.pop_if(|chunk| chunk.len() > self.width) {
                if self.break_long_words {
                    let (head, tail) = long.split_at(self.break_of(long, self.width - len));
                    line.push(head);
                    chunks.extend((!tail.is_empty()).then_some(tail));
                } else if line.is_empty() {
                    line.push(long);
                } else {
                    chunks.push(long);
                }
            }
            line.pop_if(|chunk| is_blank(&&**chunk));
            if !line.is_empty() {
                lines.push(line.concat().into_iter().collect());
            }
        }
        lines
    }

    /// Where a word is broken that is longer than a line, of which `room` is left: after its last hyphen there.
    fn break_of(&self, word: &[char], room: usize) -> usize {
        let hyphen = word[..room.min(word.len())].iter().rposition(|c| *c == '-').filter(|_| word.len() > room);
        let fits = |hyphen: &usize| self.break_on_hyphens && word[..*hyphen].iter().any(|c| *c != '-');
        hyphen.filter(fits).map_or(room, |hyphen| hyphen + 1)
    }

    /// Runs of white space, and words, in parts where they have hyphens.
    fn chunks<'a>(&self, text: &'a [char]) -> Vec<&'a [char]> {
        let (mut chunks, mut at) = (Vec::new(), 0);
        while at < text.len() {
            let spaces = text[at..].iter().take_while(|c| is_blank(**c)).count();
            let len = if spaces > 0 { spaces } else { self.word_len(text, at) };
            chunks.push(&text[at..at + len]);
            at += len;
        }
        chunks
    }

    /// How long the part of a word is that begins at `at`: `textwrap`'s `wordsep_re`.
    fn word_len(&self, text: &[char], at: usize) -> usize {
        let whole = text[at..].iter().take_while(|c| !is_blank(**c)).count();
        if !self.break_on_hyphens {
            return whole;
        }
        let get = |idx: Option<usize>| idx.and_then(|idx| text.get(idx)).copied();
        let is = |idx: Option<usize>, test: &dyn Fn(char) -> bool| get(idx).is_some_and(test);
        let before = |idx: usize, by: usize| idx.checked_sub(by);
        let is_hyphen = |c: char| c == '-';
        // Hyphens between words, as a dash of typewriters.
        let dash = |from: usize| {
            let len = text[from..].iter().take_while(|c| **c == '-').count();
            (len >= 2 && is(before(from, 1), &is_word_or_mark) && is(Some(from + len), &is_word)).then_some(len)
        };
        if let Some(len) = dash(at) {
            return len;
        }
        for (end, &c) in text.iter().enumerate().take(at + whole).skip(at + 1) {
            let letters = |place: usize, by: usize| is(before(place, by), &is_letter);
            let is_behind = letters(end, 1) && (letters(end, 2) || is(before(end, 2), &is_hyphen) && letters(end, 3));
            let next = end + 1 + usize::from(is(Some(end + 2), &is_hyphen));
            let goes_on = is(Some(end + 1), &is_letter) && is(Some(next + 1), &is_letter);
            if c == '-' && is_behind && goes_on {
                return end + 1 - at;
            }
            if dash(end).is_some() {
                return end - at;
            }
        }
        whole
    }
}

/// What `textwrap` breaks lines at.
fn is_blank(c: char) -> bool {
    "\t\n\x0b\x0c\r ".contains(c)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn is_letter(c: char) -> bool {
    is_word(c) && !c.is_numeric()
}

fn is_word_or_mark(c: char) -> bool {
    is_word(c) || "!\"'&.,?".contains(c)
}
