//! Annotation files: one JSON object a line or one array of them, images beside it. Annotations are streamed once for the
//! places of their records and then read one by one: a file may be larger than memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use vora_files::refuse_compressed;

use super::image_folder::ImageFolder;
use super::keys::RecordKeys;
use super::limits::MAX_LINE;
use super::record::Record;
use crate::error::DataError;

/// What some editors begin a UTF-8 file with.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// An annotation file with its image folder: records by number, read when asked for.
#[derive(Debug)]
pub struct Conversations {
    path: PathBuf,
    images: ImageFolder,
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
        let images = ImageFolder::open(image_folder);
        let mut found = Self {
            path: annotation.to_owned(),
            images: images?,
            keys: RecordKeys::default(),
            file: Mutex::new(file.try_clone().with_context(|| format!("cannot read {shown}"))?),
            is_array: false,
            lines: Vec::new(),
            blank: Vec::new(),
        };
        let mut file = BufReader::with_capacity(1 << 20, file);
        let head = file.fill_buf().with_context(|| format!("cannot read {shown}"))?;
        refuse_compressed(annotation, head, "JSON is read as it is")?;
        let start = skip_mark(&mut file).with_context(|| format!("cannot read {shown}"))?;
        found.is_array = is_array(&mut file).with_context(|| format!("cannot read {shown}"))?;
        if found.is_array {
            found.find_elements(&mut file, start).with_context(|| format!("reading {shown}"))?;
        } else {
            found.find_lines(&mut file, start).with_context(|| format!("reading {shown}"))?;
        }
        ensure!(!found.lines.is_empty(), DataError::no_records(shown));
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
                        depth -= 1; // the first byte was a bracket, and none comes after the last
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
    /// Where there is no such file, or it lies outside the folder or cannot be read.
    pub fn image(&self, frame: &str) -> Result<Vec<u8>> {
        self.images.read(frame)
    }

    /// Whether a record's image is there, without reading its file.
    ///
    /// # Errors
    /// Where there is no such file, or it lies outside the folder.
    pub fn find_image(&self, frame: &str) -> Result<()> {
        self.images.find(frame)
    }
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
    use std::fs;
    use std::io::Write;

    use vora_text::Part;

    use super::*;

    const GOOD: &str =
        r#"{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}"#;

    fn text(text: &str) -> Part {
        Part::Text(text.to_owned())
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
        // A whole path is one of the folder's too, where it leads there.
        let whole = |frame: &str| folder.path().join(frame).to_string_lossy().into_owned();
        assert_eq!(found.image(&whole("sub/a.png")).unwrap(), b"png");
        assert_eq!(found.image(&whole("sub/../sub/a.png")).unwrap(), b"png");
        let beside = tempfile::NamedTempFile::new_in(folder.path().parent().unwrap()).unwrap();
        for frame in [whole("gone.png"), whole("sub"), beside.path().to_string_lossy().into_owned()] {
            assert!(
                error(&frame).contains("is a whole path and does not lie in the image folder"),
                "{}",
                error(&frame)
            );
        }
        assert!(error("b.png").contains("cannot read image `b.png`"));
        let missing = found.image("b.png").unwrap_err();
        let is_missing = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
        match missing.downcast_ref() {
            Some(DataError::NoImage { name, source, .. }) => assert!(name == "b.png" && is_missing(source)),
            _ => panic!("{missing:#}"),
        }
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
        let found = Conversations { images: ImageFolder::open(&images).unwrap(), ..found };
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

    #[test]
    fn keys_may_have_other_names() {
        let line = GOOD.replace("conversations", "turns");
        let keys = RecordKeys { conversations: "turns".to_owned(), ..RecordKeys::default() };
        let (_folder, found) = file(&[line.as_bytes()]);
        assert_eq!(found.unwrap().with_keys(keys).record(0).unwrap().messages.len(), 2);
    }
}
