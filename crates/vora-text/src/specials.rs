//! The private names of a tokenizer's special tokens, single characters of Unicode's last plane, which no text from
//! outside has.

use std::borrow::Cow;
use std::collections::HashSet;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Characters from here on are this module's own; in text that comes from outside they become U+FFFD.
const RESERVED: char = '\u{100000}';
/// Special token `k` of the file is the character `ACTIVE + k`.
pub(crate) const ACTIVE: u32 = 0x10_0000;
/// The literal of special token `k`, found in somebody's text, is `INERT + k` on its way through a chat template.
pub(crate) const INERT: u32 = 0x10_8000;
/// One past the last `k`.
const MAX_SPECIAL_TOKENS: u32 = 0x7f00;
/// The place of an image, a token that goes into no model.
pub(crate) const IMAGE: char = '\u{10fffd}';
/// What a chat template writes for an image's place, found in somebody's text, on its way through the template.
pub(crate) const INERT_IMAGE: char = '\u{10fffc}';
/// No token has this character and another one.
pub(crate) const BEFORE: char = '\u{10fffb}';

/// The literals of the special tokens, and looking for them.
#[derive(Debug)]
pub(crate) struct Specials {
    literals: Vec<String>,
    longest_first: Vec<usize>,
    starts: [bool; 256], // first bytes of the literals
}

impl Specials {
    pub(crate) fn new(literals: Vec<String>) -> Self {
        let mut longest_first: Vec<usize> = (0..literals.len()).collect();
        longest_first.sort_by_key(|&k| std::cmp::Reverse(literals[k].len()));
        let mut starts = [false; 256];
        for literal in &literals {
            starts[usize::from(literal.as_bytes()[0])] = true;
        }
        Self { literals, longest_first, starts }
    }

    /// Puts the mark `base + k` for every literal, from the left, the longest that fits.
    pub(crate) fn replace<'a>(&self, text: &'a str, base: u32) -> Cow<'a, str> {
        let mut out = String::new();
        let (mut copied, mut at) = (0, 0);
        while let Some(&byte) = text.as_bytes().get(at) {
            let here = self.starts[usize::from(byte)].then(|| {
                self.longest_first.iter().find(|&&k| text.as_bytes()[at..].starts_with(self.literals[k].as_bytes()))
            });
            match here.flatten().and_then(|&k| Some((k, mark(base, k).ok()?))) {
                Some((k, mark)) => {
                    out.push_str(&text[copied..at]);
                    out.push(mark);
                    at += self.literals[k].len();
                    copied = at;
                }
                None => at += 1,
            }
        }
        if copied == 0 {
            return text.into();
        }
        out.push_str(&text[copied..]);
        out.into()
    }

    /// Puts the literal for every mark `base + k`.
    pub(crate) fn restore<'a>(&self, text: &'a str, base: u32) -> Cow<'a, str> {
        if !text.contains(|c| unmark(c, base).is_some()) {
            return text.into();
        }
        let mut out = String::with_capacity(text.len());
        for c in text.chars() {
            match unmark(c, base).and_then(|k| self.literals.get(k)) {
                Some(literal) => out.push_str(literal),
                None => out.push(c),
            }
        }
        out.into()
    }

    /// The private name of the special token that has this literal.
    pub(crate) fn name(&self, literal: &str) -> Option<char> {
        mark(ACTIVE, self.literals.iter().position(|known| known == literal)?).ok()
    }

    /// Gives the special tokens of a `tokenizer.json` their private names, makes sure that no merge leads to one, adds
    /// the image's place, and drops what would add tokens or cut text.
    pub(crate) fn rename(&self, json: &mut Value) {
        let name = |token: &str| self.name(token).map(|c| c.to_string());
        for key in ["post_processor", "truncation", "padding"] {
            json[key] = Value::Null;
        }
        let model = &mut json["model"];
        if let Some(unknown) = model["unk_token"].as_str().and_then(name) {
            model["unk_token"] = unknown.into();
        }
        match &mut model["vocab"] {
            Value::Object(vocab) => {
                for (k, literal) in self.literals.iter().enumerate() {
                    if let (Some(id), Ok(name)) = (vocab.remove(literal), mark(ACTIVE, k)) {
                        vocab.insert(name.to_string(), id);
                    }
                }
            }
            Value::Array(pieces) => {
                for piece in pieces {
                    if let Some(name) = piece[0].as_str().and_then(name) {
                        piece[0] = name.into();
                    }
                }
            }
            _ => {}
        }
        if let Some(merges) = model.get_mut("merges").and_then(Value::as_array_mut) {
            let longest = self.longest_first.first().map_or(0, |&k| self.literals[k].len());
            let literals: HashSet<&str> = self.literals.iter().map(String::as_str).collect();
            merges.retain(|merge| {
                let (left, right) = match merge {
                    Value::String(both) => both.split_once(' ').unwrap_or((both, "")),
                    pair => (pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default()),
                };
                let whole_fits = left.len() + right.len() <= longest;
                let whole_is_special = whole_fits && literals.contains(format!("{left}{right}").as_str());
                !(whole_is_special || literals.contains(left) || literals.contains(right))
            });
        }
        let mut added = Vec::new();
        for mut token in json["added_tokens"].as_array().cloned().unwrap_or_default() {
            let special = token["special"].as_bool().unwrap_or(false);
            if let Some(name) = token["content"].as_str().filter(|_| special).and_then(name) {
                token["content"] = name.into();
            }
            added.push(token);
        }
        added.push(json!({
            "id": 0, "content": IMAGE, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        }));
        json["added_tokens"] = added.into();
    }
}

/// The character for special token `k`.
///
/// # Errors
/// Where there are more of them than characters.
pub(crate) fn mark(base: u32, k: usize) -> Result<char> {
    let k = u32::try_from(k).ok().filter(|&k| k < MAX_SPECIAL_TOKENS);
    let c = k.and_then(|k| char::from_u32(base + k));
    c.with_context(|| format!("more than {MAX_SPECIAL_TOKENS} special tokens"))
}

/// The special token that a character stands for.
pub(crate) fn unmark(c: char, base: u32) -> Option<usize> {
    u32::from(c).checked_sub(base).filter(|&k| k < MAX_SPECIAL_TOKENS).map(|k| k as usize)
}

/// Text without the characters that mean something here.
pub(crate) fn without_reserved(text: &str) -> Cow<'_, str> {
    if text.contains(|c| c >= RESERVED) { text.replace(|c| c >= RESERVED, "\u{fffd}").into() } else { text.into() }
}
