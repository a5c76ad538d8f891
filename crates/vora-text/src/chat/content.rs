//! What a template takes as a turn's content: a string, or a list of parts; and what it writes for a picture.
//!
//! Nothing in a checkpoint says so. The template is asked: it renders short turns of both kinds, and what it does with
//! them decides. A turn with pictures is handed over as parts where the template shows them, as processors of HF
//! transformers do it; a turn without as a string where the template takes one; else as parts.

use minijinja::{Error, ErrorKind, Value};

use super::{Message, Part};

/// The words of a turn that a template is asked with. They stay as they are under whatever templates do to words.
const WORDS: &str = "probing";
/// A value of a part that no template looks at: where it shows, the list itself was printed.
const UNSEEN: &str = "unseen";

/// A turn as a template gets it.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) role: String,
    /// What is said, pictures by the name they were given.
    pub(super) text: String,
    content: Value,
}

impl Turn {
    pub(super) fn to_value(&self) -> Value {
        Value::from_pairs([("role", Value::from(self.role.as_str())), ("content", self.content.clone())])
    }

    fn asked(role: &str, content: Value) -> Self {
        Self { role: role.to_owned(), text: String::new(), content }
    }
}

/// What a template takes as the content of one role's turns.
#[derive(Debug, Clone, Copy, Default)]
struct Form {
    string: bool,
    parts: bool,
}

/// What a template takes as content.
#[derive(Debug, Default)]
pub(super) struct ContentForms {
    system: Form,
    user: Form,
    assistant: Form,
    /// What it writes for a part that is a picture, where it writes something.
    image: Option<Written>,
}

/// What a template writes for a picture.
#[derive(Debug)]
struct Written {
    all: String,
    /// The one of its tokens that stands for the picture itself; none where that cannot be told.
    place: Option<String>,
}

impl ContentForms {
    /// Asks a template, of which `render` renders turns; `image_token` is what the checkpoint calls the picture's
    /// place, where it says.
    ///
    /// A template that runs for too long is asked nothing more.
    pub(super) fn of(render: impl Fn(&[Turn], bool) -> Result<String, Error>, image_token: Option<&str>) -> Self {
        Self::asked(render, image_token).unwrap_or_default()
    }

    fn asked(render: impl Fn(&[Turn], bool) -> Result<String, Error>, image_token: Option<&str>) -> Option<Self> {
        // None where it runs for too long; else what it wrote, if that has the words and not the list itself.
        let ask = |turns: &[Turn], prompt: bool| match render(turns, prompt) {
            Ok(text) => Some((text.contains(WORDS) && !text.contains(UNSEEN)).then_some(text)),
            Err(error) if error.kind() == ErrorKind::OutOfFuel => None,
            Err(_) => Some(None),
        };
        let one = |content: Value| [Turn::asked("user", content)];
        let (string, parts) = (|| Value::from(WORDS), || Value::from(vec![probe()]));
        let user = Form { string: ask(&one(string()), true)?.is_some(), parts: ask(&one(parts()), true)?.is_some() };
        let mut image = None;
        if user.parts
            && let Some(shown) = ask(&one(Value::from(vec![picture(), probe()])), true)?
        {
            let bare = ask(&one(parts()), true)?.unwrap_or_default();
            let all = inserted(&bare, &shown).trim().to_owned();
            let place = place(&all, image_token);
            image = (!all.is_empty()).then_some(Written { all, place });
        }
        let said = || if user.string || !user.parts { "?".into() } else { Value::from(vec![words("?")]) };
        let pair = |content: Value| [Turn::asked("user", said()), Turn::asked("assistant", content)];
        let assistant =
            Form { string: ask(&pair(string()), false)?.is_some(), parts: ask(&pair(parts()), false)?.is_some() };
        let pair = |content: Value| [Turn::asked("system", content), Turn::asked("user", said())];
        let system =
            Form { string: ask(&pair(string()), true)?.is_some(), parts: ask(&pair(parts()), true)?.is_some() };
        Some(Self { system, user, assistant, image })
    }

    /// A message as the template takes it: `image` for pictures, texts as `text` changes them.
    pub(super) fn turn(&self, message: &Message, image: &str, text: impl Fn(&str) -> String) -> Turn {
        let joined: String = message
            .content
            .iter()
            .map(|part| match part {
                Part::Text(t) => text(t),
                Part::Image => image.to_owned(),
            })
            .collect();
        let form = match message.role.as_str() {
            "system" => self.system,
            "assistant" => self.assistant,
            _ => self.user,
        };
        let content = if self.shows_pictures_of(message) {
            Value::from(parts(&message.content, &text))
        } else if form.parts && !form.string {
            Value::from(vec![words(&joined)])
        } else {
            Value::from(joined.as_str())
        };
        Turn { role: text(&message.role), text: joined, content }
    }

    /// What the template writes where a picture of these messages goes; none where the messages' own marks say.
    ///
    /// # Errors
    /// With all that the template writes for a picture, where it cannot be told which of it is the picture's place.
    pub(super) fn place(&self, messages: &[Message]) -> Result<Option<&str>, &str> {
        match &self.image {
            Some(written) if messages.iter().any(|message| self.shows_pictures_of(message)) => {
                written.place.as_deref().map(Some).ok_or(written.all.as_str())
            }
            _ => Ok(None),
        }
    }

    /// The roles whose content it takes as a list of parts and not as a string.
    pub(super) fn lists(&self) -> impl Iterator<Item = &'static str> {
        let forms = [("system", self.system), ("user", self.user), ("assistant", self.assistant)];
        forms.into_iter().filter(|(_, form)| form.parts && !form.string).map(|(role, _)| role)
    }

    fn shows_pictures_of(&self, message: &Message) -> bool {
        self.image.is_some() && message.content.contains(&Part::Image)
    }
}

fn words(text: &str) -> Value {
    Value::from_pairs([("type", "text"), ("text", text)])
}

/// The words that are asked with, as a part that shows when it is printed itself.
fn probe() -> Value {
    Value::from_pairs([("type", "text"), ("text", WORDS), (UNSEEN, UNSEEN)])
}

fn picture() -> Value {
    Value::from_pairs([("type", "image")])
}

/// The parts of a turn. The line break between a picture's mark and words belongs to the mark; a list needs none.
fn parts(content: &[Part], text: impl Fn(&str) -> String) -> Vec<Value> {
    let is_image = |idx: Option<usize>| idx.is_some_and(|idx| content.get(idx) == Some(&Part::Image));
    let part = |(idx, part): (usize, &Part)| match part {
        Part::Image => Some(picture()),
        Part::Text(said) => {
            let said = if is_image(idx.checked_sub(1)) { said.strip_prefix('\n').unwrap_or(said) } else { said };
            let said = if is_image(Some(idx + 1)) { said.strip_suffix('\n').unwrap_or(said) } else { said };
            (!said.is_empty()).then(|| words(&text(said)))
        }
    };
    content.iter().enumerate().filter_map(part).collect()
}

/// What `longer` has that `shorter` has not: between what they begin and what they end with in common.
fn inserted<'a>(shorter: &str, longer: &'a str) -> &'a str {
    let common = |pairs: &mut dyn Iterator<Item = (char, char)>| -> usize {
        pairs.take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
    };
    let begin = common(&mut shorter.chars().zip(longer.chars()));
    let (shorter, longer) = (&shorter[begin..], &longer[begin..]);
    let end = common(&mut shorter.chars().rev().zip(longer.chars().rev()));
    &longer[..longer.len() - end]
}

/// Which of what is written for a picture stands for the picture itself: the checkpoint's own word for it, else the
/// only token in brackets, else the only one that neither begins nor ends something; all of it where nothing stands
/// in brackets.
fn place(written: &str, image_token: Option<&str>) -> Option<String> {
    if let Some(token) = image_token.filter(|token| !token.is_empty() && written.contains(token)) {
        return Some(token.to_owned());
    }
    let marks = ["start", "begin", "boi", "end", "eoi", "/", "fake", "around"];
    // `<|a>` and `<a|>`: Gemma 4 begins and ends something so.
    let is_half = |token: &str| token.starts_with("<|") != token.ends_with("|>");
    let is_mark = |token: &str| is_half(token) || marks.iter().any(|mark| token.to_lowercase().contains(mark));
    let tokens = bracketed(written);
    let inner: Vec<&str> = tokens.iter().copied().filter(|token| !is_mark(token)).collect();
    match (tokens.as_slice(), inner.as_slice()) {
        ([], _) => Some(written.to_owned()),
        ([only], _) | (_, [only]) => Some((*only).to_owned()),
        _ => None,
    }
}

/// `<a>` and `[a]`, each once.
fn bracketed(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(begin) = rest.find(['<', '[']) {
        rest = &rest[begin..];
        let close = if rest.starts_with('<') { '>' } else { ']' };
        let Some(end) = rest.find(close) else { break };
        let token = &rest[..=end];
        if !token.contains(char::is_whitespace) && !found.contains(&token) {
            found.push(token);
        }
        rest = &rest[end + 1..];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_told_from_what_stands_around_it() {
        for (written, image_token, expected) in [
            ("<image>", None, Some("<image>")),
            ("<|vision_start|><|image_pad|><|vision_end|>", None, Some("<|image_pad|>")),
            ("<|image><image><image|>", None, Some("<image>")),
            ("<start_of_image>", None, Some("<start_of_image>")),
            ("[IMG]", None, Some("[IMG]")),
            ("<img><IMG_CONTEXT></img>", Some("<IMG_CONTEXT>"), Some("<IMG_CONTEXT>")),
            ("<a><b>", None, None),
            ("<a><b>", Some("<b>"), Some("<b>")),
            ("<a><b>", Some("<c>"), None),
            ("PICTURE", None, Some("PICTURE")),
        ] {
            assert_eq!(place(written, image_token).as_deref(), expected, "{written}");
        }
        assert_eq!(inserted("[INST]a[/INST]", "[INST][IMG]a[/INST]"), "[IMG]");
        assert_eq!(inserted("User: a", "User:<image>a"), "<image>");
        assert_eq!(inserted("a", "a"), "");
    }
}
