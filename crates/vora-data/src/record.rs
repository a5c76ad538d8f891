//! The conversation format: one JSON object a line or one array of them, images beside it.
//!
//! `{"id": .., "frames": ["a.jpg"], "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, ..]}`; LLaVA's
//! `image` instead of `frames` is read too, and a turn may be `{"role": .., "content": ..}`, as the hub's chats are.
//! Annotations are streamed once for the places of their records and then read one by one: a file may be larger than
//! memory.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use vora_llm::{Message, Part};

/// What marks an image's place in a human turn.
pub const IMAGE_PLACE: &str = "<image>";

/// No record's text is longer: 16 MiB.
pub(crate) const MAX_LINE: u64 = 16 << 20;

/// No image file is larger: 256 MiB.
pub(crate) const MAX_IMAGE_FILE: u64 = 256 << 20;

/// One conversation about some images, or about none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The record's own, or `file:line` where it has none.
    pub id: String,
    /// Image files, relative to the image folder.
    pub frames: Vec<String>,
    /// `user` and `assistant` by turns, after at most one `system`; the assistant has the last word. There are as many
    /// places for images as there are frames.
    pub messages: Vec<Message>,
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
enum Id {
    Text(String),
    Number(i64),
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
    Parts(Vec<RawPart>),
}

#[derive(Deserialize)]
struct RawPart {
    r#type: String,
    text: Option<String>,
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
        let mut object: Map<String, Value> = serde_json::from_str(text).map_err(|e| {
            let message = e.to_string();
            let what = message.rsplit_once(" at line").map_or(message.as_str(), |(what, _)| what);
            anyhow!("not a record: {what}, at column {}", e.column())
        })?;
        let frames: Option<OneOrMore> = take(&mut object, &keys.frames)?;
        let image: Option<OneOrMore> = take(&mut object, "image")?;
        ensure!(frames.is_none() || image.is_none(), "it has both `{}` and `image`", keys.frames);
        let frames = match frames.or(image) {
            None => Vec::new(),
            Some(OneOrMore::One(frame)) => vec![frame],
            Some(OneOrMore::More(frames)) => frames,
        };
        let id = id(&mut object)?;
        let raw = take(&mut object, &keys.conversations)?;
        let raw = raw.with_context(|| format!("it lacks the key `{}`", keys.conversations))?;
        Ok(Self { id, messages: messages(raw, frames.len())?, frames })
    }

    /// A record whose images came with it: what its own keys say of images is not looked at. Its words are a
    /// conversation, under `keys.conversations` or `messages`, as JSON or as a string of JSON; or pairs under `texts`;
    /// or a caption, under `caption` or `text`, the first where there are several.
    pub(crate) fn with_images(mut object: Map<String, Value>, keys: &RecordKeys, num_images: usize) -> Result<Self> {
        let id = id(&mut object)?;
        let frames = (0..num_images).map(|idx| idx.to_string()).collect();
        for key in [keys.conversations.as_str(), "messages"] {
            if let Some(Value::String(text)) = object.get(key) {
                let value =
                    serde_json::from_str(text).map_err(|e| anyhow!("its `{key}` is a string, but no JSON: {e}"));
                object.insert(key.to_owned(), value?);
            }
            if let Some(raw) = take(&mut object, key)? {
                return Ok(Self { id, messages: messages(raw, num_images)?, frames });
            }
        }
        if let Some(pairs) = take::<Vec<Pair>>(&mut object, "texts")? {
            let turn = |from: &str, text| RawTurn { from: from.to_owned(), value: RawText::Whole(text) };
            let pair = |pair: Pair| [turn("user", pair.user), turn("assistant", pair.assistant)];
            return Ok(Self {
                id,
                messages: messages(pairs.into_iter().flat_map(pair).collect(), num_images)?,
                frames,
            });
        }
        for key in ["caption", "text"] {
            let caption = match take(&mut object, key)? {
                None => continue,
                Some(OneOrMore::One(caption)) => caption,
                Some(OneOrMore::More(captions)) => captions.into_iter().next().context("it has no caption")?,
            };
            ensure!(num_images > 0, "it has a caption, but no image");
            let question = Message { role: "user".to_owned(), content: vec![Part::Image; num_images] };
            return Ok(Self { id, messages: vec![question, Message::new("assistant", &caption)], frames });
        }
        bail!(
            "it has neither a conversation under `{}` or `messages` nor `texts`, `caption` or `text`",
            keys.conversations
        )
    }
}

fn id(object: &mut Map<String, Value>) -> Result<String> {
    Ok(match take(object, "id")? {
        Some(Id::Text(id)) => id,
        Some(Id::Number(id)) => id.to_string(),
        None => String::new(),
    })
}

/// The value of a key, if it is there and not null.
fn take<T: DeserializeOwned>(object: &mut Map<String, Value>, key: &str) -> Result<Option<T>> {
    let value = object.remove(key).unwrap_or_default();
    serde_json::from_value(value).map_err(|e| anyhow!("its `{key}` is not as expected: {e}"))
}

/// Checks the order of turns and gives each image its place.
fn messages(raw: Vec<RawTurn>, num_images: usize) -> Result<Vec<Message>> {
    let mut messages: Vec<Message> = Vec::with_capacity(raw.len());
    for RawTurn { from, value } in raw {
        let value = match value {
            RawText::Whole(text) => text,
            RawText::Parts(parts) => parts.into_iter().map(RawPart::shown).collect::<Result<_>>()?,
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
    let places = messages.iter().flat_map(|message| &message.content).filter(|part| **part == Part::Image).count();
    if places == 0 {
        // No question says where: the images come before the first one.
        let first = messages.iter_mut().find(|message| message.role == "user").context("nobody asks")?;
        *first = Message::question_about(num_images, &shown(first));
    } else {
        ensure!(places == num_images, "{places} places `{IMAGE_PLACE}` in the questions, {num_images} images");
    }
    Ok(messages)
}

impl RawPart {
    fn shown(self) -> Result<String> {
        match (self.r#type.as_str(), self.text) {
            ("image", _) => Ok(IMAGE_PLACE.to_owned()),
            ("text", Some(text)) => Ok(text),
            (other, _) => bail!("a part of a turn is `{other}`, expected `image`, or `text` with its text"),
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
    blank: Vec<usize>,      // how many records were found before each blank line
}

impl Conversations {
    /// Finds the records of `annotation`, an object a line or one array of objects; images lie under `image_folder`,
    /// which is empty for text alone.
    ///
    /// # Errors
    /// Where either cannot be read, or an array is cut short.
    pub fn open(annotation: &Path, image_folder: &Path) -> Result<Self> {
        let shown = annotation.display();
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
        found.is_array = is_array(&mut file).with_context(|| format!("cannot read {shown}"))?;
        if found.is_array {
            found.find_elements(&mut file).with_context(|| format!("reading {shown}"))?;
        } else {
            found.find_lines(&mut file).with_context(|| format!("reading {shown}"))?;
        }
        ensure!(!found.lines.is_empty(), "{shown} has no records");
        Ok(found)
    }

    /// Reads records whose keys have other names.
    #[must_use]
    pub fn with_keys(self, keys: RecordKeys) -> Self {
        Self { keys, ..self }
    }

    fn find_lines(&mut self, file: &mut impl BufRead) -> Result<()> {
        let (mut start, mut at, mut blank) = (0_u64, 0_u64, true);
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
    fn find_elements(&mut self, file: &mut impl BufRead) -> Result<()> {
        let (mut at, mut start, mut depth) = (0_u64, 0_u64, 0_usize);
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
            self.blank.push(self.lines.len());
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
        let line = 1 + index + self.blank.partition_point(|before| *before <= index);
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
    /// ordinary file, or larger than an image may be.
    pub fn image(&self, frame: &str) -> Result<Vec<u8>> {
        let path = self.image_path(frame)?;
        let file = File::open(&path).with_context(|| format!("cannot read image `{frame}`"))?;
        let mut bytes = Vec::new();
        let len = file.take(MAX_IMAGE_FILE + 1).read_to_end(&mut bytes);
        let len = len.with_context(|| format!("cannot read image `{frame}`"))? as u64;
        ensure!(len <= MAX_IMAGE_FILE, "image `{frame}` has more than {} MiB", MAX_IMAGE_FILE >> 20);
        Ok(bytes)
    }

    fn image_path(&self, frame: &str) -> Result<PathBuf> {
        let inside = Path::new(frame).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        ensure!(inside && !frame.is_empty(), "image `{frame}` does not lie in the image folder");
        let folder = self.image_folder.as_ref();
        let folder = folder.with_context(|| format!("image `{frame}` of a source without an image folder"))?;
        let path = fs::canonicalize(folder.join(frame))
            .with_context(|| format!("cannot read image `{frame}` in {}", folder.display()))?;
        ensure!(path.starts_with(folder), "image `{frame}` is a link out of the image folder");
        ensure!(path.is_file(), "image `{frame}` is not a file");
        Ok(path)
    }
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
        assert_eq!(record.messages[0].content, [Part::Image, text("\nWhat?")]);
        assert_eq!((record.id.as_str(), record.frames), ("7", vec!["a.png".to_owned()]));
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let says = |line: &str, text: &str| {
            let message = format!("{:#}", parse(line).unwrap_err());
            assert!(message.contains(text), "`{message}` lacks `{text}`");
        };
        says(&conversation(r#""frames": []"#, "<image>"), "1 places `<image>` in the questions, 0 images");
        says(&conversation(r#""frames": ["a", "b"]"#, "<image>"), "1 places `<image>` in the questions, 2 images");
        says(&conversation(r#""frames": ["a"], "image": "b""#, "x"), "both `frames` and `image`");
        says(r#"{"conversations": []}"#, "no conversation");
        says(r#"{"conversations": [{"from": "human", "value": "x"}]}"#, "the last question has no answer");
        says(r#"{"conversations": [{"from": "gpt", "value": "x"}]}"#, "turn 1 is from `gpt`, it is the user's");
        says(r#"{"conversations": [{"from": "robot", "value": "x"}]}"#, "a turn is from `robot`");
        says(r#"{"id": "a"}"#, "it lacks the key `conversations`");
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
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret.png"), b"png").unwrap();
        symlink(outside.path().join("secret.png"), folder.path().join("a.png")).unwrap();
        symlink(outside.path(), folder.path().join("out")).unwrap();
        symlink("data.jsonl", folder.path().join("b.png")).unwrap();
        for frame in ["a.png", "out/secret.png"] {
            let message = format!("{:#}", found.image(frame).unwrap_err());
            assert!(message.contains("a link out of the image folder"), "{message}");
        }
        assert!(found.image("b.png").is_ok());
    }
}
