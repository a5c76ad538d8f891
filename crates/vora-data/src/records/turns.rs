//! Turns of a conversation: their order, and the places of images in them.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};
use vora_text::{Message, Part};

use super::frames::{frame, is_given};

/// What marks an image's place in a human turn.
pub const IMAGE_PLACE: &str = "<image>";

/// What is noted of a record whose pictures have no place in its words.
pub const NO_MARK: &str = "it has a picture and no mark `<image>`: the picture stands before the first question";

/// What marks the place of all of a record's images in its first question, as the published code has it.
const VIDEO_PLACE: &str = "<video>";

/// A turn as a record has it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawTurn {
    #[serde(alias = "role")]
    pub(super) from: String,
    #[serde(alias = "content")]
    pub(super) value: RawText,
}

/// What a turn says, whole or in parts.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected text or a list of parts")]
pub(super) enum RawText {
    Whole(String),
    Parts(Vec<Map<String, Value>>),
}

/// Checks the order of turns; with the pictures that parts of them name, and whether a part is one at all.
pub(super) fn messages(raw: Vec<RawTurn>) -> Result<(Vec<Message>, Vec<String>, bool)> {
    let mut messages: Vec<Message> = Vec::with_capacity(raw.len());
    let mut named = Vec::new();
    let mut has_picture_parts = false;
    for RawTurn { from, value } in raw {
        if let RawText::Parts(parts) = &value {
            has_picture_parts |= parts.iter().any(is_picture_part);
        }
        let value = match value {
            RawText::Whole(text) => text,
            RawText::Parts(parts) => parts.iter().map(|part| shown_part(part, &mut named)).collect::<Result<_>>()?,
        };
        let role = match from.as_str() {
            "system" => "system",
            "human" | "user" => "user",
            "gpt" | "assistant" => "assistant",
            _ => bail!("a turn is from `{from}`, expected one of `human`, `gpt`, `system`"),
        };
        let expected = match messages.last().map(|message| message.role.as_str()) {
            None if role == "system" => "system",
            Some("user") => "assistant",
            _ => "user",
        };
        ensure!(role == expected, "turn {} is from `{from}`, it is the {expected}'s", messages.len() + 1);
        // Only a question has places; elsewhere the mark is text like any other.
        let content = if role == "user" { split_places(&value) } else { vec![Part::Text(value)] };
        messages.push(Message::of_parts(role, content));
    }
    match messages.last() {
        None => bail!("it has no conversation"),
        Some(message) => ensure!(message.role == "assistant", "the last question has no answer"),
    }
    Ok((messages, named, has_picture_parts))
}

/// Takes the marks of a record without pictures for words, as the published code does; returns a note of that.
pub(super) fn read_marks_as_words(messages: &mut [Message]) -> Option<String> {
    let mut found = false;
    for message in messages {
        if message.content.contains(&Part::Image) {
            message.content = vec![Part::Text(shown(message))];
            found = true;
        }
    }
    found.then(|| format!("it has a mark `{IMAGE_PLACE}` and no picture: the mark is read as words"))
}

/// Gives each image its place, as the published code does: where the first question says [`VIDEO_PLACE`], else where
/// questions have marks, else before the first question. Several images without marks of their own are frames of a
/// video, each after its second. Returns a note where no question said where.
pub(super) fn place_images(messages: &mut [Message], num_images: usize) -> Result<Option<String>> {
    let num_places = |messages: &[Message]| {
        messages.iter().flat_map(|message| &message.content).filter(|part| **part == Part::Image).count()
    };
    let marked = num_places(messages);
    let first = messages.iter_mut().find(|message| message.role == "user").context("nobody asks")?;
    let question = shown(first);
    let has_video = num_images > 0 && question.contains(VIDEO_PLACE);
    let all = || match num_images {
        1 => IMAGE_PLACE.to_owned(),
        _ => (1..=num_images).map(|second| format!("{second}s: {IMAGE_PLACE}; ")).collect::<String>() + "\n",
    };
    if has_video {
        first.content = split_places(&question.replace(VIDEO_PLACE, &all()));
    } else if marked == 0 && num_images > 0 {
        first.content = split_places(&(all() + &question));
        return Ok(Some(NO_MARK.to_owned()));
    }
    let places = num_places(messages);
    ensure!(places == num_images, "{places} places `{IMAGE_PLACE}` in the questions, {num_images} images");
    Ok(None)
}

/// Whether a part of a turn is a picture.
fn is_picture_part(part: &Map<String, Value>) -> bool {
    matches!(part.get("type").and_then(Value::as_str), Some("image" | "image_url" | "input_image"))
}

/// A part of a turn as text, with [`IMAGE_PLACE`] for a picture, whose name goes to the `named` ones where it has one.
fn shown_part(part: &Map<String, Value>, named: &mut Vec<String>) -> Result<String> {
    let text = part.get("text").and_then(Value::as_str);
    match (part.get("type").and_then(Value::as_str), text) {
        _ if is_picture_part(part) => {
            let keys = ["image", "image_url", "path", "url", "bytes"];
            match keys.iter().find_map(|key| Some((*key, part.get(*key)?)).filter(|(_, value)| is_given(value))) {
                Some(("bytes", _)) => named.extend(frame(&Value::Object(part.clone()))?),
                Some((_, value)) => named.extend(frame(value)?),
                None => {}
            }
            Ok(IMAGE_PLACE.to_owned())
        }
        (Some("text" | "input_text" | "output_text") | None, Some(text)) => Ok(text.to_owned()),
        (Some("video"), _) => bail!("a part of a turn is a `video`, which is not read yet"),
        (other, _) => {
            let other = other.unwrap_or("without a type");
            bail!("a part of a turn is `{other}`, expected `image`, or `text` with its text")
        }
    }
}

/// `"a<image>b"` -> text, image, text
fn split_places(text: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    for (idx, text) in text.split(IMAGE_PLACE).enumerate() {
        if idx > 0 {
            parts.push(Part::Image);
        }
        if !text.is_empty() {
            parts.push(Part::Text(text.to_owned()));
        }
    }
    parts
}

/// How much text a message has.
pub(crate) fn num_bytes(message: &Message) -> usize {
    message.content.iter().map(|part| if let Part::Text(text) = part { text.len() } else { 0 }).sum()
}

/// What a message says, with [`IMAGE_PLACE`] for its images.
pub(crate) fn shown(message: &Message) -> String {
    let part = |part: &Part| match part {
        Part::Text(text) => text.clone(),
        Part::Image => IMAGE_PLACE.to_owned(),
    };
    message.content.iter().map(part).collect()
}
