//! The conversation format: one JSON object a line or one array of them, images beside it.
//!
//! `{"id": .., "frames": ["a.jpg"], "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, ..]}`; LLaVA's
//! `image` and the hub's `images` instead of `frames` are read too, and a turn may be `{"role": .., "content": ..}`, as
//! the hub's chats are.
//! Annotations are streamed once for the places of their records and then read one by one: a file may be larger than
//! memory.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use vora_text::{Message, Part};

use crate::frames::{frame, frames, is_given, not_taken, picture_keys, short_name};

/// What marks an image's place in a human turn.
pub const IMAGE_PLACE: &str = "<image>";

/// What is noted of a record whose pictures have no place in its words.
pub const NO_MARK: &str = "it has a picture and no mark `<image>`: the picture stands before the first question";

/// What marks the place of all of a record's images in its first question, as the published code has it.
const VIDEO_PLACE: &str = "<video>";

/// No record's text is longer: 16 MiB.
pub(crate) const MAX_LINE: u64 = 16 << 20;

/// What a record says is no longer, all of it: 1 MiB. Its tokens take some hundred times as much while they are made.
const MAX_WORDS: usize = 1 << 20;

/// No record of a shard is larger, with its images: 64 MiB.
pub(crate) const MAX_RECORD: u64 = 64 << 20;

/// What some editors begin a UTF-8 file with.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

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
    /// What of it was not taken as it stands, in words: it is told and counted by whoever makes batches.
    pub notes: Vec<String>,
}

/// What a record's own keys are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordKeys {
    /// Its image files.
    pub frames: String,
    /// Its turns.
    pub conversations: String,
}

impl Default for RecordKeys {
    fn default() -> Self {
        Self { frames: "frames".to_owned(), conversations: "conversations".to_owned() }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Deserialize)]
struct RawTurn {
    #[serde(alias = "role")]
    from: String,
    #[serde(alias = "content")]
    value: RawText,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawText {
    Whole(String),
    Parts(Vec<Map<String, Value>>),
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
    /// under `texts`; or a caption, under `caption` or `text`, the first where there are several.
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
        let given = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
        is_text_only |= beside.is_none() && !picture_keys(keys).into_iter().any(given);
        let mut frames = match beside {
            Some(num_images) => (0..num_images).map(|idx| idx.to_string()).collect(),
            None => frames(&mut object, keys)?,
        };
        for key in picture_keys(keys) {
            object.remove(key);
        }
        let mut notes = Vec::new();
        let messages = match words(&mut object, keys)? {
            Words::Turns(turns) => {
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
                let question = Message { role: "user".to_owned(), content: vec![Part::Image; frames.len()] };
                vec![question, Message::new("assistant", &caption)]
            }
        };
        let len: usize = messages.iter().map(num_bytes).sum();
        ensure!(len <= MAX_WORDS, "it says {len} bytes of text, at most {MAX_WORDS} are read");
        if beside.is_none_or(|num_images| num_images == 0) {
            notes.extend(not_taken(&object, keys, frames.is_empty())?);
        }
        Ok(Self { id, frames, messages, notes })
    }

    /// Whether it has a key under which words are read.
    pub(crate) fn has_words(object: &Map<String, Value>, keys: &RecordKeys) -> bool {
        let words = [keys.conversations.as_str(), "messages", "texts", "caption", "text"];
        words.iter().any(|key| object.get(*key).is_some_and(|value| !value.is_null()))
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
    Caption(String),
}

fn words(object: &mut Map<String, Value>, keys: &RecordKeys) -> Result<Words> {
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

/// Checks the order of turns; with the pictures that parts of them name, and whether a part is one at all.
fn messages(raw: Vec<RawTurn>) -> Result<(Vec<Message>, Vec<String>, bool)> {
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
        messages.push(Message { role: role.to_owned(), content });
    }
    match messages.last() {
        None => bail!("it has no conversation"),
        Some(message) => ensure!(message.role == "assistant", "the last question has no answer"),
    }
    Ok((messages, named, has_picture_parts))
}

/// Takes the marks of a record without pictures for words, as the published code does; what is told of that.
fn read_marks_as_words(messages: &mut [Message]) -> Option<String> {
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
/// video, each behind its second. What is told of it, where no question said where.
fn place_images(messages: &mut [Message], num_images: usize) -> Result<Option<String>> {
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

/// An annotation file with its image folder: records by number, read when asked for.
#[derive(Debug)]
pub struct Conversations {
    path: PathBuf,
    image_folder: Option<PathBuf>, // without links or dots
    keys: RecordKeys,
    file: Mutex<File>,
    is_array: bool,
    lines: Vec<(u64, u32)>, // start, length of each record; a longer one than can be read has length u32::MAX
    blank: Vec<(usize, usize)>, // runs of blank lines: how many records before it, blank lines up to its end
}

impl Conversations {
    /// Finds the records of `annotation`, an object a line or one array of objects; images lie under `image_folder`,
    /// which is empty for text alone.
    ///
    /// # Errors
    /// Where either cannot be read, or an array is cut short.
    pub fn open(annotation: &Path, image_folder: &Path) -> Result<Self> {
        let shown = annotation.display();
        ensure!(!annotation.exists() || annotation.is_file(), "cannot read {shown}: it is not a file");
        let file = File::open(annotation).with_context(|| format!("cannot read {shown}"))?;
        let image_folder = (!image_folder.as_os_str().is_empty()).then(|| {
            fs::canonicalize(image_folder)
                .with_context(|| format!("cannot read the image folder {}", image_folder.display()))
        });
        let mut found = Self {
            path: annotation.to_owned(),
            image_folder: image_folder.transpose()?,
            keys: RecordKeys::default(),
            file: Mutex::new(file.try_clone().with_context(|| format!("cannot read {shown}"))?),
            is_array: false,
            lines: Vec::new(),
            blank: Vec::new(),
        };
        let mut file = BufReader::with_capacity(1 << 20, file);
        let start = skip_mark(&mut file).with_context(|| format!("cannot read {shown}"))?;
        found.is_array = is_array(&mut file).with_context(|| format!("cannot read {shown}"))?;
        if found.is_array {
            found.find_elements(&mut file, start).with_context(|| format!("reading {shown}"))?;
        } else {
            found.find_lines(&mut file, start).with_context(|| format!("reading {shown}"))?;
        }
        ensure!(!found.lines.is_empty(), "{shown} has no records");
        Ok(found)
    }

    /// Reads records whose keys have other names.
    #[must_use]
    pub fn with_keys(self, keys: RecordKeys) -> Self {
        Self { keys, ..self }
    }

    fn find_lines(&mut self, file: &mut impl BufRead, mut start: u64) -> Result<()> {
        let (mut at, mut blank) = (start, true);
        loop {
            let chunk = file.fill_buf()?;
            if chunk.is_empty() {
                if at > start {
                    self.add_line(start, at, blank);
                }
                return Ok(());
            }
            let newline = chunk.iter().position(|byte| *byte == b'\n');
            let line = &chunk[..newline.unwrap_or(chunk.len())];
            blank = blank && line.iter().all(u8::is_ascii_whitespace);
            at += line.len() as u64;
            let used = line.len() + usize::from(newline.is_some());
            file.consume(used);
            if newline.is_some() {
                self.add_line(start, at, blank);
                at += 1;
                (start, blank) = (at, true);
            }
        }
    }

    /// The elements of one array, by its brackets and commas; what stands between them is read later.
    fn find_elements(&mut self, file: &mut impl BufRead, mut start: u64) -> Result<()> {
        let (mut at, mut depth) = (start, 0_usize);
        let (mut in_string, mut escaped, mut ended) = (false, false, false);
        loop {
            let chunk = file.fill_buf()?;
            if chunk.is_empty() {
                ensure!(ended, "the array has no end, the file is cut short");
                return Ok(());
            }
            for &byte in chunk {
                match byte {
                    _ if ended => ensure!(byte.is_ascii_whitespace(), "there is more behind the array's end"),
                    _ if escaped => escaped = false,
                    b'\\' if in_string => escaped = true,
                    b'"' => in_string = !in_string,
                    _ if in_string => {}
                    b'[' | b'{' => {
                        depth += 1;
                        if depth == 1 {
                            start = at + 1;
                        }
                    }
                    b',' if depth == 1 => {
                        self.add_line(start, at, false);
                        start = at + 1;
                    }
                    b']' | b'}' => {
                        depth -= 1; // the first byte was a bracket, and none comes behind the last
                        ended = depth == 0;
                        if ended && at > start {
                            self.add_line(start, at, false);
                        }
                    }
                    _ => {}
                }
                at += 1;
            }
            let used = chunk.len();
            file.consume(used);
        }
    }

    fn add_line(&mut self, start: u64, end: u64, blank: bool) {
        if blank {
            let before = self.blank.last().map_or(0, |(_, count)| *count);
            match self.blank.last_mut() {
                Some((records, count)) if *records == self.lines.len() => *count += 1,
                _ => self.blank.push((self.lines.len(), before + 1)),
            }
        } else {
            self.lines.push((start, u32::try_from(end - start).unwrap_or(u32::MAX)));
        }
    }

    /// How many records there are, good and bad.
    pub fn len(&self) -> u64 {
        self.lines.len() as u64
    }

    /// Never: a file of no records does not open.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// `file:line` of a record; of one in an array, its number from 1.
    pub fn place(&self, index: u64) -> String {
        if self.is_array {
            return format!("{}: record {}", self.path.display(), index + 1);
        }
        let index = index as usize;
        let runs = self.blank.partition_point(|(records, _)| *records <= index);
        let line = 1 + index + runs.checked_sub(1).map_or(0, |last| self.blank[last].1);
        format!("{}:{line}", self.path.display())
    }

    /// Reads the record of this number, `0..len`.
    ///
    /// # Errors
    /// Names file and line, and says what is wrong with it.
    pub fn record(&self, index: u64) -> Result<Record> {
        let place = || self.place(index);
        let line = self.line(index).with_context(place)?;
        let mut record = Record::parse(&line, &self.keys).with_context(place)?;
        if record.id.is_empty() {
            record.id = place();
        }
        Ok(record)
    }

    /// The JSON of the record of this number, for keys that [`Record`] has no use for.
    ///
    /// # Errors
    /// Where there is no such record, or it is larger than one may be.
    pub fn line(&self, index: u64) -> Result<Vec<u8>> {
        let (start, len) = *self.lines.get(index as usize).context("there is no such record")?;
        ensure!(u64::from(len) <= MAX_LINE, "the record has more than {} MiB", MAX_LINE >> 20);
        let mut line = vec![0; len as usize];
        let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut line).context("the file has become shorter")?;
        Ok(line)
    }

    /// Reads the file of a record's image, undecoded.
    ///
    /// # Errors
    /// Where the path leaves the image folder, by `..`, by its root or by a link; where the file is missing, no
    /// ordinary file, or larger than an image may be. Links may lead to what lies beside the image folder, and to what
    /// the hub's client keeps.
    pub fn image(&self, frame: &str) -> Result<Vec<u8>> {
        if let Some(data) = frame.strip_prefix("data:") {
            let (_, data) = data.split_once("base64,").context("an image is a `data:` address, but not of base64")?;
            let data: String = data.split_ascii_whitespace().collect(); // some break lines
            return BASE64.decode(data).context("an image is no base64");
        }
        let path = self.image_path(frame)?;
        vora_image::read_image(&path).with_context(|| format!("cannot read image `{}`", short_name(frame)))
    }

    /// Whether a record's image is there: what [`Self::image`] says of its name, without reading the file.
    ///
    /// # Errors
    /// Where the path leaves the image folder, or the file is missing or no ordinary one.
    pub fn find_image(&self, frame: &str) -> Result<()> {
        if !frame.starts_with("data:") {
            self.image_path(frame)?;
        }
        Ok(())
    }

    fn image_path(&self, frame: &str) -> Result<PathBuf> {
        let shown = short_name(frame);
        let inside = Path::new(frame).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        ensure!(inside && !frame.is_empty(), "image `{shown}` does not lie in the image folder");
        let folder = self.image_folder.as_ref();
        let folder = folder.with_context(|| format!("image `{shown}` of a source without an image folder"))?;
        let path = fs::canonicalize(folder.join(frame))
            .with_context(|| format!("cannot read image `{shown}` in {}", folder.display()))?;
        ensure!(
            path.starts_with(folder) || is_beside(&path, folder) || is_blob(&path),
            "image `{shown}` is a link out of the image folder"
        );
        ensure!(path.is_file(), "image `{shown}` is not a file");
        Ok(path)
    }
}

/// Whether a file lies in the folder that the image folder lies in.
fn is_beside(path: &Path, folder: &Path) -> bool {
    folder.parent().is_some_and(|parent| parent.parent().is_some() && path.starts_with(parent))
}

/// Whether a file is one that the hub's client keeps: `datasets--owner--name/blobs/HASH`; its folders of snapshots are
/// made of links to such.
fn is_blob(path: &Path) -> bool {
    let blobs = path.parent().filter(|blobs| blobs.ends_with("blobs"));
    let repository = blobs.and_then(Path::parent).and_then(Path::file_name).and_then(|name| name.to_str());
    repository.is_some_and(|name| ["datasets--", "models--", "spaces--"].iter().any(|kind| name.starts_with(kind)))
}

/// Goes past a byte-order mark; how many bytes that are.
fn skip_mark(file: &mut impl BufRead) -> Result<u64> {
    let len = if file.fill_buf()?.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
    file.consume(len);
    Ok(len as u64)
}

/// Whether the first byte that is no space opens an array. Looks for it in the first buffer alone: 1 MiB.
fn is_array(file: &mut impl BufRead) -> Result<bool> {
    Ok(file.fill_buf()?.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'['))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

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

    fn file(lines: &[&[u8]]) -> (tempfile::TempDir, Result<Conversations>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        fs::write(&path, lines.concat()).unwrap();
        let found = Conversations::open(&path, folder.path());
        (folder, found)
    }

    #[test]
    fn records_are_read_by_number_and_errors_name_the_line() {
        let good = GOOD.as_bytes();
        let nameless = GOOD.replace(r#""id": "a", "#, "");
        let lines = [good, b"\n\r\n\n{oops\n  \n", nameless.as_bytes(), b"\r\n\xff\n", good];
        let (_folder, found) = file(&lines);
        let found = found.unwrap();
        assert_eq!(found.len(), 5);
        assert_eq!(found.record(4).unwrap(), found.record(0).unwrap());
        let error = |index| format!("{:#}", found.record(index).unwrap_err());
        assert!(error(1).contains("data.jsonl:4: not a record"), "{}", error(1));
        assert!(error(3).contains("data.jsonl:7: not UTF-8"), "{}", error(3));
        assert!(found.record(2).unwrap().id.ends_with("data.jsonl:6"));
        assert!(error(5).contains("no such record"));
    }

    #[test]
    fn an_array_is_read_by_its_elements() {
        let tricky = GOOD.replace("Hi", r#"]}, \\\" [{"#);
        let (_folder, found) = file(&[b" [", GOOD.as_bytes(), b",\n7 ,", tricky.as_bytes(), b",, [{\"id\": 1}]\n]\n "]);
        let found = found.unwrap();
        assert_eq!(found.len(), 5);
        assert_eq!(found.record(0).unwrap().id, "a");
        assert_eq!(found.record(2).unwrap().messages[0].content, [text(r#"]}, \" [{"#)]);
        let error = |index| format!("{:#}", found.record(index).unwrap_err());
        for index in [1, 3, 4] {
            assert!(
                error(index).contains(&format!("data.jsonl: record {}: not a record", index + 1)),
                "{}",
                error(index)
            );
        }
    }

    #[test]
    fn what_a_record_says_has_a_limit() {
        let line = GOOD.replace("Hi", &"x".repeat(MAX_WORDS - 2));
        assert!(parse(&line).is_ok());
        let message = parse(&line.replace("Ho", "Hop")).unwrap_err().to_string();
        assert_eq!(message, "it says 1048577 bytes of text, at most 1048576 are read");
    }

    #[test]
    fn a_mark_of_byte_order_is_skipped() {
        let lines: [&[u8]; 4] = [b"\xef\xbb\xbf", GOOD.as_bytes(), b"\n", GOOD.as_bytes()];
        let array: [&[u8]; 3] = [b"\xef\xbb\xbf[", GOOD.as_bytes(), b"]"];
        for (pieces, len) in [(&lines[..], 2), (&array[..], 1)] {
            let (_folder, found) = file(pieces);
            let found = found.unwrap();
            assert_eq!((found.len(), found.record(0).unwrap().id.as_str()), (len, "a"));
        }
    }

    #[test]
    fn a_record_may_hold_its_picture() {
        let (_folder, found) = file(&[GOOD.replacen('{', r#"{"image": {"bytes": "cG5n"}, "#, 1).as_bytes()]);
        let found = found.unwrap();
        let record = found.record(0).unwrap();
        assert_eq!(found.image(&record.frames[0]).unwrap(), b"png");
        assert!(found.image("data:image/png,x").unwrap_err().to_string().contains("not of base64"));
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
    fn keys_may_have_other_names() {
        let line = GOOD.replace("conversations", "turns").replace("{\"id\": \"a\"", "{\"pictures\": \"a.png\"");
        let keys = RecordKeys { frames: "pictures".to_owned(), conversations: "turns".to_owned() };
        assert_eq!(Record::parse(line.as_bytes(), &keys).unwrap().frames, ["a.png"]);
        let (_folder, found) = file(&[line.as_bytes()]);
        assert_eq!(found.unwrap().with_keys(keys).record(0).unwrap().messages.len(), 2);
    }

    #[test]
    fn text_alone_needs_no_folder() {
        let (folder, _) = file(&[GOOD.as_bytes()]);
        let found = Conversations::open(&folder.path().join("data.jsonl"), Path::new("")).unwrap();
        assert!(found.record(0).is_ok());
        assert!(found.image("a.png").unwrap_err().to_string().contains("without an image folder"));
    }

    #[test]
    fn a_line_without_end_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        let mut writer = File::create(&path).unwrap();
        writer.write_all(b"{\"id\": \"").unwrap();
        writer.set_len(MAX_LINE + 100).unwrap(); // zeros, which take no room on the disk
        writer.seek(SeekFrom::End(0)).unwrap();
        writeln!(writer, "\n{GOOD}").unwrap();
        let found = Conversations::open(&path, folder.path()).unwrap();
        let message = format!("{:#}", found.record(0).unwrap_err());
        assert!(message.contains("data.jsonl:1: the record has more than 16 MiB"), "{message}");
        assert_eq!(found.record(1).unwrap().id, "a");
    }

    #[test]
    fn files_that_are_no_annotations_say_so() {
        let error = |lines: &[&[u8]]| format!("{:#}", file(lines).1.unwrap_err());
        assert!(error(&[b" \n [\n", GOOD.as_bytes()]).contains("data.jsonl: the array has no end"));
        assert!(error(&[b"[", GOOD.as_bytes(), b"]]"]).contains("more behind the array's end"));
        assert!(error(&[b"[]"]).contains("has no records"));
        assert!(error(&[b"\n\n"]).contains("has no records"));
        let missing = Conversations::open(Path::new("nowhere.jsonl"), Path::new(".")).unwrap_err();
        assert!(missing.to_string().contains("cannot read nowhere.jsonl"));
    }

    #[test]
    fn images_stay_in_their_folder() {
        let (folder, found) = file(&[GOOD.as_bytes()]);
        let found = found.unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/a.png"), b"png").unwrap();
        assert_eq!(found.image("sub/a.png").unwrap(), b"png");
        let error = |frame: &str| format!("{:#}", found.image(frame).unwrap_err());
        for frame in ["../a.png", "sub/../../a.png", "/etc/hosts", ""] {
            assert!(error(frame).contains("does not lie in the image folder"), "{}", error(frame));
        }
        assert!(error("b.png").contains("cannot read image `b.png`"));
        assert!(error("sub").contains("is not a file"));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_may_stay_in_the_folder_but_not_leave_it() {
        use std::os::unix::fs::symlink;
        let (folder, found) = file(&[GOOD.as_bytes()]);
        let found = found.unwrap();
        let images = folder.path().join("one/images");
        fs::create_dir_all(&images).unwrap();
        let found = Conversations { image_folder: Some(fs::canonicalize(&images).unwrap()), ..found };
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret.png"), b"png").unwrap();
        symlink(outside.path().join("secret.png"), images.join("a.png")).unwrap();
        symlink(outside.path(), images.join("out")).unwrap();
        symlink(folder.path().join("data.jsonl"), images.join("up")).unwrap();
        fs::write(images.join("whole.png"), b"png").unwrap();
        symlink("whole.png", images.join("b.png")).unwrap();
        // Beside the image folder, and as the hub's client keeps its files.
        fs::write(folder.path().join("one/beside.png"), b"png").unwrap();
        symlink("../beside.png", images.join("c.png")).unwrap();
        let blobs = outside.path().join("datasets--owner--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join("0a1b"), b"png").unwrap();
        symlink(blobs.join("0a1b"), images.join("d.png")).unwrap();
        for frame in ["a.png", "out/secret.png", "up"] {
            let message = format!("{:#}", found.image(frame).unwrap_err());
            assert!(message.contains("a link out of the image folder"), "{message}");
        }
        for frame in ["b.png", "c.png", "d.png"] {
            assert_eq!(found.image(frame).unwrap(), b"png", "{frame}");
        }
    }
}
