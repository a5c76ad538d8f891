//! One record of JSON: a conversation about some images, or about none.
//!
//! `{"id": .., "frames": ["a.jpg"], "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, ..]}`; LLaVA's
//! `image` and the hub's `images` instead of `frames` are read too, and a turn may be `{"role": .., "content": ..}`, as
//! the hub's chats are. TRL's preferences are records of their own form.

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use vora_image::BoundingBox;
use vora_text::{Message, Part};

use super::frames::{frames, is_given, not_taken, picture_keys};
use super::keys::RecordKeys;
use super::preference::{self, RawPreference};
use super::turns::{RawText, RawTurn, messages, num_bytes, place_images, read_marks_as_words, shown};

/// What a record says is no longer, all of it: 1 MiB. Its tokens take some hundred times as much while they are made.
const MAX_WORDS: usize = 1 << 20;

/// One conversation about some images, or about none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The record's own, or `file:line` where it has none.
    pub id: String,
    /// Image files, relative to the image folder; or images themselves, as `data:` addresses.
    pub frames: Vec<String>,
    /// `user` and `assistant` by turns, after at most one `system`; the assistant has the last word. There are as many
    /// places for images as there are frames.
    pub messages: Vec<Message>,
    /// The last answer that was rejected in favour of the one in `messages`, where the record has a preference.
    pub rejected: Option<Message>,
    /// What of it was not taken as it stands, in words: it is told and counted by whoever makes batches.
    pub notes: Vec<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a name or a list of them")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// A question with its answer, as some of the hub's sets have them in `texts`.
#[derive(Deserialize)]
struct Pair {
    user: String,
    assistant: String,
}

impl Record {
    /// Reads one line.
    ///
    /// # Errors
    /// Says what is wrong, but not where: whoever has the line knows.
    pub fn parse(line: &[u8], keys: &RecordKeys) -> Result<Self> {
        let text = std::str::from_utf8(line).map_err(|e| anyhow!("not UTF-8 from byte {} on", e.valid_up_to()))?;
        let object: Map<String, Value> = serde_json::from_str(text).map_err(|e| {
            let message = e.to_string();
            let what = message.rsplit_once(" at line").map_or(message.as_str(), |(what, _)| what);
            anyhow!("not a record: {what}, at column {}", e.column())
        })?;
        Self::read(object, keys, None, false)
    }

    /// A record whose images came with it: what its own keys say of images is not looked at.
    pub(crate) fn with_images(object: Map<String, Value>, keys: &RecordKeys, num_images: usize) -> Result<Self> {
        Self::read(object, keys, Some(num_images), false)
    }

    /// A record that has no place for images: a mark in it is a word.
    pub(crate) fn of_words(object: Map<String, Value>, keys: &RecordKeys) -> Result<Self> {
        Self::read(object, keys, Some(0), true)
    }

    /// Its words are a conversation, under `keys.conversations` or `messages`, as JSON or as a string of JSON; or pairs
    /// under `texts`; or a caption, under `caption` or `text`, the first where there are several. A record with both
    /// `chosen` and `rejected` is a preference, whatever else it has.
    fn read(
        mut object: Map<String, Value>,
        keys: &RecordKeys,
        beside: Option<usize>,
        mut is_text_only: bool,
    ) -> Result<Self> {
        for key in ["videos", "video"] {
            ensure!(!object.get(key).is_some_and(is_given), "its `{key}` has a video, which is not read yet");
        }
        let id = id(&mut object);
        is_text_only |= beside.is_none() && !Self::has_place_for_pictures(&object, keys);
        let mut frames = match beside {
            Some(num_images) => (0..num_images).map(|idx| idx.to_string()).collect(),
            None => frames(&mut object, keys)?,
        };
        for key in picture_keys(keys) {
            object.remove(key);
        }
        let (mut notes, mut rejected) = (Vec::new(), None);
        let said = words(&mut object, keys)?;
        if let Words::Preference(preference) = &said {
            rejected = messages(preference.rejected.clone())?.0.pop();
        }
        let messages = match said {
            Words::Turns(turns) | Words::Preference(RawPreference { chosen: turns, .. }) => {
                let (mut messages, named, has_picture_parts) = messages(turns)?;
                if beside.is_none() && frames.is_empty() {
                    frames = named;
                }
                if frames.is_empty() && is_text_only && !has_picture_parts {
                    notes.extend(read_marks_as_words(&mut messages));
                }
                notes.extend(place_images(&mut messages, frames.len())?);
                messages
            }
            Words::Caption(caption) => {
                ensure!(!frames.is_empty(), "it has a caption, but no image");
                let question = Message::of_parts("user", vec![Part::Image; frames.len()]);
                vec![question, Message::new("assistant", &caption)]
            }
        };
        ensure!(
            rejected.as_ref().is_none_or(
                |rejected| messages.last().map(shown).as_deref().map(str::trim) != Some(shown(rejected).trim())
            ),
            "its `chosen` and `rejected` are the same answer"
        );
        let len: usize = messages.iter().chain(&rejected).map(num_bytes).sum();
        ensure!(len <= MAX_WORDS, "it says {len} bytes of text, at most {MAX_WORDS} are read");
        if !frames.is_empty() {
            messages.iter().try_for_each(|message| BoundingBox::all_in(&shown(message)).map(drop))?;
        }
        if beside.is_none_or(|num_images| num_images == 0) {
            notes.extend(not_taken(&object, keys, frames.is_empty())?);
        }
        Ok(Self { id, frames, messages, rejected, notes })
    }

    /// Whether it has a key under which words are read.
    pub(crate) fn has_words(object: &Map<String, Value>, keys: &RecordKeys) -> bool {
        let words = [keys.conversations.as_str(), "messages", "texts", "caption", "text", "chosen", "rejected"];
        words.iter().any(|key| object.get(*key).is_some_and(|value| !value.is_null()))
    }

    /// Whether it has a key under which pictures are read, with or without one there.
    pub(crate) fn has_place_for_pictures(object: &Map<String, Value>, keys: &RecordKeys) -> bool {
        picture_keys(keys).into_iter().any(|key| object.get(key).is_some_and(|value| !value.is_null()))
    }

    /// How many pictures it names under the keys that are read.
    pub(crate) fn num_named(object: &Map<String, Value>, keys: &RecordKeys) -> usize {
        let count = |key: &str| match object.get(key) {
            Some(Value::Array(list)) => list.iter().filter(|value| is_given(value)).count(),
            Some(value) => usize::from(is_given(value)),
            None => 0,
        };
        picture_keys(keys).into_iter().map(count).max().unwrap_or(0)
    }
}

/// What a record says.
enum Words {
    Turns(Vec<RawTurn>),
    Preference(RawPreference),
    Caption(String),
}

fn words(object: &mut Map<String, Value>, keys: &RecordKeys) -> Result<Words> {
    if preference::is_preference(object)
        && let Some(preference) = RawPreference::take(object)?
    {
        return Ok(Words::Preference(preference));
    }
    for key in [keys.conversations.as_str(), "messages"] {
        if let Some(Value::String(text)) = object.get(key) {
            let value = serde_json::from_str(text).map_err(|e| anyhow!("its `{key}` is a string, but no JSON: {e}"));
            object.insert(key.to_owned(), value?);
        }
        if let Some(turns) = take(object, key)? {
            return Ok(Words::Turns(turns));
        }
    }
    if let Some(pairs) = take::<Vec<Pair>>(object, "texts")? {
        let turn = |from: &str, text| RawTurn { from: from.to_owned(), value: RawText::Whole(text) };
        let pair = |pair: Pair| [turn("user", pair.user), turn("assistant", pair.assistant)];
        return Ok(Words::Turns(pairs.into_iter().flat_map(pair).collect()));
    }
    for key in ["caption", "text"] {
        return Ok(Words::Caption(match take(object, key)? {
            None => continue,
            Some(OneOrMore::One(caption)) => caption,
            Some(OneOrMore::More(captions)) => captions.into_iter().next().context("it has no caption")?,
        }));
    }
    // One answer without the other says which is missing.
    if let Some(preference) = RawPreference::take(object)? {
        return Ok(Words::Preference(preference));
    }
    bail!("it has neither a conversation under `{}` or `messages` nor `texts`, `caption` or `text`", keys.conversations)
}

/// Its id as text, whatever its type; empty where it has none.
fn id(object: &mut Map<String, Value>) -> String {
    match object.remove("id") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(id)) => id,
        Some(other) => other.to_string(),
    }
}

/// The value of a key, if it is there and not null.
fn take<T: DeserializeOwned>(object: &mut Map<String, Value>, key: &str) -> Result<Option<T>> {
    let value = object.remove(key).unwrap_or_default();
    serde_json::from_value(value).map_err(|e| anyhow!("its `{key}` is not as expected: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        r#"{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}"#;

    fn conversation(extra: &str, question: &str) -> String {
        format!(
            r#"{{{extra}, "conversations": [{{"from": "human", "value": "{question}"}}, {{"from": "gpt", "value": "<image>"}}]}}"#
        )
    }

    fn parse(line: &str) -> Result<Record> {
        Record::parse(line.as_bytes(), &RecordKeys::default())
    }

    fn text(text: &str) -> Part {
        Part::Text(text.to_owned())
    }

    #[test]
    fn images_stand_where_the_text_says_else_first() {
        let record = parse(&conversation(r#""frames": ["a.png", "b.png"]"#, "x<image>y<image>")).unwrap();
        assert_eq!(record.messages[0].content, [text("x"), Part::Image, text("y"), Part::Image]);
        assert_eq!(record.messages[1].content, [text("<image>")]); // an answer has no places
        let record = parse(&conversation(r#""id": 7, "image": "a.png", "width": 3"#, "What?")).unwrap();
        assert_eq!(record.messages[0].content, [Part::Image, text("What?")]);
        assert_eq!((record.id.as_str(), record.frames), ("7", vec!["a.png".to_owned()]));
    }

    #[test]
    fn frames_of_a_video_stand_behind_their_seconds() {
        let content = |frames: &str, question: &str| {
            let record = parse(&conversation(frames, question)).unwrap();
            (record.messages[0].content.clone(), record.notes.len())
        };
        let (one, two) = (r#""frames": ["a"]"#, r#""frames": ["a", "b"]"#);
        let seconds =
            |behind: &str| vec![text("1s: "), Part::Image, text("; 2s: "), Part::Image, text(&format!("; \n{behind}"))];
        assert_eq!(content(one, "See <video>?"), (vec![text("See "), Part::Image, text("?")], 0));
        assert_eq!(content(two, "<video>What?"), (seconds("What?"), 0));
        assert_eq!(content(two, "What?"), (seconds("What?"), 1));
        // Without a frame it is a word.
        assert_eq!(content(r#""id": 1"#, "See <video>?"), (vec![text("See <video>?")], 0));
    }

    #[test]
    fn a_mark_in_a_record_of_text_alone_is_a_word() {
        for keys in [r#""id": 1"#, r#""frames": null"#] {
            let record = parse(&conversation(keys, "What does <image> mean in HTML?")).unwrap();
            assert_eq!(record.messages[0].content, [text("What does <image> mean in HTML?")]);
            assert_eq!(record.notes, ["it has a mark `<image>` and no picture: the mark is read as words"]);
        }
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let says = |line: &str, text: &str| {
            let message = format!("{:#}", parse(line).unwrap_err());
            assert!(message.contains(text), "`{message}` lacks `{text}`");
        };
        says(&conversation(r#""frames": []"#, "<image>"), "1 places `<image>` in the questions, 0 images");
        let part = r#"{"messages": [{"role": "user", "content": [{"type": "image"}, {"text": "What?"}]},
            {"role": "assistant", "content": "A cat."}]}"#;
        says(part, "1 places `<image>` in the questions, 0 images");
        says(&conversation(r#""frames": ["a", "b"]"#, "<image>"), "1 places `<image>` in the questions, 2 images");
        says(&conversation(r#""frames": ["a"], "image": "b""#, "x"), "both `frames` and `image`");
        says(r#"{"conversations": []}"#, "no conversation");
        says(r#"{"conversations": [{"from": "human", "value": "x"}]}"#, "the last question has no answer");
        says(r#"{"conversations": [{"from": "gpt", "value": "x"}]}"#, "turn 1 is from `gpt`, it is the user's");
        says(r#"{"conversations": [{"from": "robot", "value": "x"}]}"#, "a turn is from `robot`");
        says(r#"{"id": "a"}"#, "neither a conversation under `conversations` or `messages` nor");
        says(
            r#"{"conversations": [{"from": "human"}]}"#,
            "its `conversations` is not as expected: missing field `value`",
        );
        says(r#"{"id": "#, "at column 7");
        let error = Record::parse(b"{\"id\": \"\xff\"}", &RecordKeys::default()).unwrap_err().to_string();
        assert!(error.contains("not UTF-8 from byte 8 on"), "{error}");
    }

    #[test]
    fn what_a_record_says_has_a_limit() {
        let line = GOOD.replace("Hi", &"x".repeat(MAX_WORDS - 2));
        assert!(parse(&line).is_ok());
        let message = parse(&line.replace("Ho", "Hop")).unwrap_err().to_string();
        assert_eq!(message, "it says 1048577 bytes of text, at most 1048576 are read");
    }

    #[test]
    fn turns_are_written_in_several_ways() {
        let object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap();
        let read = |text: &str| Record::with_images(object(text), &RecordKeys::default(), 1).unwrap().messages;
        let parts = read(
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "text": null}]},
                {"role": "assistant", "content": "A cat."}]}"#,
        );
        assert_eq!(parts[0].content, [text("What?"), Part::Image]);
        let string = read(
            r#"{"image": "x.jpg", "conversations": "[{\"from\": \"human\", \"value\": \"What?<image>\"}, {\"from\": \"gpt\", \"value\": \"A cat.\"}]"}"#,
        );
        assert_eq!(string, parts);
        let pairs = read(r#"{"texts": [{"user": "What?<image>", "assistant": "A cat.", "source": "s"}]}"#);
        assert_eq!(pairs, parts);
        let captions = read(r#"{"caption": ["A cat.", "A dog."]}"#);
        assert_eq!((captions[0].content.as_slice(), &captions[1]), ([Part::Image].as_slice(), &parts[1]));
        let error = |text: &str, num_images| {
            Record::with_images(object(text), &RecordKeys::default(), num_images).unwrap_err().to_string()
        };
        assert!(error(r#"{"text": "A cat."}"#, 0).contains("a caption, but no image"));
        assert!(error(r#"{"label": 3}"#, 1).contains("neither a conversation under `conversations`"));
        assert!(error(r#"{"conversations": "A cat."}"#, 1).contains("is a string, but no JSON"));
        assert!(error(r#"{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}"#, 1).contains("`audio`"));
    }

    #[test]
    fn a_box_outside_its_picture_is_refused_by_name() {
        let read = |frames: &str, answer: &str| {
            let turns = format!(r#"[{{"from": "human", "value": "Where?"}}, {{"from": "gpt", "value": "{answer}"}}]"#);
            let line = format!(r#"{{"frames": [{frames}], "conversations": {turns}}}"#);
            Record::parse(line.as_bytes(), &RecordKeys::default()).map(drop)
        };
        read(r#""a.png""#, "<box>(10,20),(1000,400)</box>").unwrap();
        read("", "<box>(10,20),(1100,400)</box>").unwrap(); // there is no picture to lie outside of
        let error = read(r#""a.png""#, "<box>(10,20),(1100,400)</box>").unwrap_err().to_string();
        assert!(error.starts_with("the box (10,20),(1100,400) reaches outside the picture"), "{error}");
    }

    #[test]
    fn keys_may_have_other_names() {
        let line = GOOD.replace("conversations", "turns").replace("{\"id\": \"a\"", "{\"pictures\": \"a.png\"");
        let keys = RecordKeys { frames: "pictures".to_owned(), conversations: "turns".to_owned() };
        assert_eq!(Record::parse(line.as_bytes(), &keys).unwrap().frames, ["a.png"]);
    }
}
