//! WebDataset's shards: tar files whose members of one name, up to the first dot of their base name, are one record.
//!
//! `a.json` is a conversation or holds a caption, `a.txt` is a caption; what begins like a picture is one, whatever its
//! name ends in, and several (`a.0.jpg`, `a.1.jpg`) stand in the order of their numbers. A plain tar file is indexed by
//! its headers, a compressed one read as it comes. Names are split, and members left out, as webdataset 1.0.2 does it.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};
use tar::{Archive, Entries, EntryType, PaxExtensions};

use crate::record::{BYTE_ORDER_MARK, MAX_LINE, MAX_RECORD, Record, RecordKeys};
use crate::sample::{Sample, SampleMaker};
use crate::shards::{Entry, Shard, Take};
use crate::source::Source;

/// No record has more members.
const MAX_MEMBERS: usize = 1000;

/// No member's name is longer, as no path is that a system opens.
const MAX_NAME: u64 = 4096;

/// No header that stands before a member's own is longer.
const MAX_EXTENDED_HEADER: u64 = 1 << 20;

/// What follows the last member of a whole archive, at least.
const END_MARK: u64 = 512;

/// Endings of pictures: what has one of them and does not begin like a picture is a broken one.
const PICTURES: [&str; 16] = [
    "jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif", "heic",
    "jxl",
];

/// Endings of videos.
const VIDEOS: [&str; 8] = ["mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg"];

/// Members of one name: what stands behind it, and what is inside or where.
struct Group<P> {
    name: String,
    members: Vec<(String, P)>,
    fault: Option<String>, // why this is no record
}

/// Where a member is in its file.
#[derive(Clone, Copy)]
struct Place {
    start: u64,
    size: u64,
}

/// What a member is for.
enum Part {
    Json(Vec<u8>),
    Text(Vec<u8>),
    Image(Vec<u8>),
    Other,
    /// Why the record is none.
    Fault(String),
}

/// By what stands behind its record's name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Json,
    Text,
    Image,
    Video,
    Other,
}

impl Ending {
    fn of(suffix: &str) -> Self {
        match suffix.rsplit('.').next().unwrap_or_default() {
            "json" | "jsn" => Self::Json,
            "txt" | "text" | "transcript" => Self::Text,
            ending if PICTURES.contains(&ending) => Self::Image,
            ending if VIDEOS.contains(&ending) => Self::Video,
            _ => Self::Other,
        }
    }

    fn is_words(self) -> bool {
        matches!(self, Self::Json | Self::Text)
    }
}

impl Part {
    /// Reads a member of `size` bytes, of which its record may have `left`.
    fn read(suffix: &str, size: u64, left: &mut u64, file: &mut impl Read) -> Result<Self> {
        let mut bytes = Vec::new();
        file.by_ref().take(size.min(16)).read_to_end(&mut bytes)?;
        let ending = match Ending::of(suffix) {
            Ending::Other if vora_image::is_image(&bytes) => Ending::Image,
            ending => ending,
        };
        let (most, make): (u64, fn(Vec<u8>) -> Self) = match ending {
            Ending::Json => (MAX_LINE, Self::Json),
            Ending::Text => (MAX_LINE, Self::Text),
            Ending::Image => (MAX_RECORD, Self::Image),
            Ending::Video => return Ok(Self::Fault(format!("its .{suffix} is a video, which is not read yet"))),
            Ending::Other => return Ok(Self::Other),
        };
        if size > most {
            return Ok(Self::Fault(format!("its .{suffix} has more than {} MiB", most >> 20)));
        }
        if size > *left {
            return Ok(Self::Fault(format!("its members have more than {} MiB together", MAX_RECORD >> 20)));
        }
        *left -= size;
        bytes.reserve_exact(size as usize - bytes.len());
        file.take(size - bytes.len() as u64).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 == size, "its .{suffix} is cut short");
        if ending.is_words() && bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(make(bytes))
    }
}

/// `train/a.0.PNG` -> `train/a`, `0.png`. A base name that begins with a dot is nobody's: `._a.png` holds what a Mac
/// knows of `a.png`.
fn split(path: &str) -> Option<(&str, String)> {
    let base = path.rfind('/').map_or(0, |slash| slash + 1);
    let dot = base + path[base..].find('.').filter(|dot| *dot > 0)?;
    let first = path.split('/').next().unwrap_or_default();
    let is_meta = first.len() >= 4 && first.starts_with("__") && first.ends_with("__");
    (!is_meta).then(|| (&path[..dot], path[dot + 1..].to_lowercase()))
}

/// A member's name, from the headers before its own where it has not enough room.
#[derive(Default)]
struct Extended {
    name: Option<Vec<u8>>,
    fault: Option<String>,
}

impl Extended {
    /// Whether this entry is a header for the next one.
    fn take<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<bool> {
        let size = entry.size();
        match entry.header().entry_type() {
            EntryType::GNULongName if size > MAX_NAME => self.fault = Some(too_long(size)),
            EntryType::GNULongName => {
                let mut name = Vec::new();
                entry.read_to_end(&mut name)?;
                name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
                self.name = Some(name);
            }
            EntryType::XHeader if size > MAX_EXTENDED_HEADER => {
                self.fault = Some(format!("the header before its member has {size} bytes, which is more than 1 MiB"));
            }
            EntryType::XHeader => {
                let mut header = Vec::new();
                entry.read_to_end(&mut header)?;
                for extension in PaxExtensions::new(&header) {
                    let extension = extension?;
                    match extension.key_bytes() {
                        b"path" if extension.value_bytes().len() as u64 > MAX_NAME => {
                            self.fault = Some(too_long(extension.value_bytes().len() as u64));
                        }
                        b"path" => self.name = Some(extension.value_bytes().to_vec()),
                        b"size" => bail!("it has a member of more than 8 GiB"),
                        _ => {}
                    }
                }
            }
            EntryType::GNULongLink | EntryType::XGlobalHeader => {}
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn too_long(size: u64) -> String {
    format!("the name of its member has {size} bytes, more than {MAX_NAME}")
}

/// Groups members that follow each other; `content` looks into one. Stops where `take` returns false.
fn group<R: Read, P>(
    entries: Entries<'_, R>,
    mut content: impl FnMut(&mut tar::Entry<'_, R>, &str, bool) -> Result<P>,
    take: &mut dyn FnMut(Group<P>) -> bool,
) -> Result<()> {
    let mut open: Option<Group<P>> = None;
    let mut extended = Extended::default();
    // Raw, as the other way reads names of any length.
    for entry in entries.raw(true) {
        let mut entry = entry?;
        if extended.take(&mut entry)? {
            continue;
        }
        let Extended { name, mut fault } = std::mem::take(&mut extended);
        let path = String::from_utf8_lossy(&name.unwrap_or_else(|| entry.path_bytes().into_owned())).into_owned();
        let kind = entry.header().entry_type();
        ensure!(kind != EntryType::GNUSparse, "its member `{path}` is stored with holes; write it without --sparse");
        let is_link = matches!(kind, EntryType::Link | EntryType::Symlink);
        if !is_link && !matches!(kind, EntryType::Regular | EntryType::Continuous) {
            continue;
        }
        let Some((name, suffix)) = split(&path) else { continue };
        let starts = open.as_ref().is_none_or(|open| open.name != name);
        if starts
            && let Some(closed) = open.take()
            && !take(closed)
        {
            return Ok(());
        }
        let open = open.get_or_insert_with(|| Group { name: name.to_owned(), members: Vec::new(), fault: None });
        if is_link {
            fault = Some(format!("its .{suffix} is a link, only files that the shard holds are read"));
        } else if open.members.iter().any(|(before, _)| *before == suffix) {
            fault = Some(format!("its .{suffix} comes twice"));
        } else if open.members.len() == MAX_MEMBERS {
            fault = Some(format!("it has more than {MAX_MEMBERS} members"));
        }
        if fault.is_some() {
            open.fault = open.fault.take().or(fault);
            continue;
        }
        let content = content(&mut entry, &suffix, starts).with_context(|| format!("its member `{path}`"))?;
        open.members.push((suffix, content));
    }
    if let Some(closed) = open {
        take(closed);
    }
    Ok(())
}

impl<P> Group<P> {
    fn has_words(&self) -> bool {
        self.members.iter().any(|(suffix, _)| Ending::of(suffix).is_words())
    }

    fn is_words_alone(&self) -> bool {
        self.members.iter().all(|(suffix, _)| Ending::of(suffix).is_words())
    }

    fn lies_apart(&mut self) {
        let fault =
            "its words and its other members lie apart in the shard; members of one name must follow each other";
        self.fault.get_or_insert_with(|| fault.to_owned());
    }
}

/// The member of words that counts: the one whose name ends at once, or else the only one.
fn only(name: &str, mut words: Vec<(String, Vec<u8>)>, plain: &[&str]) -> Result<Option<(String, Vec<u8>)>> {
    if let Some(place) = words.iter().position(|(suffix, _)| plain.contains(&suffix.as_str())) {
        return Ok(Some(words.swap_remove(place)));
    }
    if let [(first, _), .., (last, _)] = words.as_slice() {
        bail!(
            "{} of its members are words, `{name}.{first}` to `{name}.{last}`: a record's name ends at the first dot, so \
             they are all of one record; where each is one, its name needs another mark than a dot",
            words.len()
        );
    }
    Ok(words.pop())
}

impl Group<Part> {
    fn entry(mut self, file: &Path, keys: &RecordKeys) -> Result<Entry> {
        let place = format!("{}: record `{}`", file.display(), self.name);
        let mut record = || {
            if let Some(fault) = self.fault.take() {
                bail!(fault);
            }
            self.members.sort_by(|(a, _), (b, _)| natural(a, b));
            let (mut jsons, mut texts, mut images) = (Vec::new(), Vec::new(), Vec::new());
            let suffixes: Vec<_> = self.members.iter().map(|(suffix, _)| format!(".{suffix}")).collect();
            for (suffix, part) in std::mem::take(&mut self.members) {
                match part {
                    Part::Json(bytes) => jsons.push((suffix, bytes)),
                    Part::Text(bytes) => texts.push((suffix, bytes)),
                    Part::Image(bytes) => images.push(bytes),
                    Part::Other => {}
                    Part::Fault(fault) => bail!(fault),
                }
            }
            ensure!(
                !jsons.is_empty() || !texts.is_empty(),
                "it has no words: neither .json nor .txt is among its members {}",
                suffixes.join(", ")
            );
            let mut object = Map::new();
            if let Some((suffix, bytes)) = only(&self.name, jsons, &["json", "jsn"])? {
                object = serde_json::from_slice(&bytes).with_context(|| format!("its .{suffix}"))?;
            }
            let named = Record::num_named(&object, keys);
            ensure!(named <= images.len(), "it names {named} images, {} lie beside it", images.len());
            if !Record::has_words(&object, keys)
                && let Some((suffix, bytes)) = only(&self.name, texts, &["txt", "text", "transcript"])?
            {
                let text = String::from_utf8(bytes).with_context(|| format!("its .{suffix} is not UTF-8"))?;
                object.insert("caption".to_owned(), Value::String(text.trim().to_owned()));
            }
            Ok((Record::with_images(object, keys, images.len())?, images))
        };
        let (mut record, images) = record().with_context(|| place.clone())?;
        if record.id.is_empty() {
            record.id = self.name;
        }
        Ok(Entry { place, record, images })
    }
}

/// `2.png` before `10.png`: runs of digits compare as numbers.
fn natural(a: &str, b: &str) -> Ordering {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let (mut rest, mut other) = (a, b);
    loop {
        let (len, other_len) = (digits(rest), digits(other));
        if len > 0 && other_len > 0 {
            let number = |text: &str, len: usize| text[..len].trim_start_matches('0').to_owned();
            let (x, y) = (number(rest, len), number(other, other_len));
            let order = x.len().cmp(&y.len()).then_with(|| x.cmp(&y));
            if order != Ordering::Equal {
                return order;
            }
            (rest, other) = (&rest[len..], &other[other_len..]);
            continue;
        }
        let (mut chars, mut others) = (rest.chars(), other.chars());
        match (chars.next(), others.next()) {
            (Some(x), Some(y)) if x == y => (rest, other) = (chars.as_str(), others.as_str()),
            (None, None) => return a.cmp(b),
            (x, y) => return x.cmp(&y),
        }
    }
}

/// A compressed tar file, read from its start on.
pub(crate) struct GzipTar {
    pub(crate) path: PathBuf,
    pub(crate) keys: RecordKeys,
}

impl Shard for GzipTar {
    fn len(&self) -> Option<u64> {
        None
    }

    fn read(&self, skip: u64, take: &mut Take<'_>) -> Result<()> {
        let mut read = || {
            let file = BufReader::with_capacity(1 << 20, File::open(&self.path)?);
            let mut archive = Archive::new(MultiGzDecoder::new(file));
            let mut left = MAX_RECORD;
            let content = |entry: &mut tar::Entry<'_, _>, suffix: &str, starts: bool| {
                if starts {
                    left = MAX_RECORD;
                }
                Part::read(suffix, entry.size(), &mut left, entry)
            };
            let (hasher, mut wordless) = (RandomState::new(), HashSet::new());
            let mut skipped = 0;
            group(archive.entries()?, content, &mut |mut group| {
                let name = hasher.hash_one(&group.name);
                if !group.has_words() {
                    wordless.insert(name);
                } else if group.is_words_alone() && wordless.contains(&name) {
                    group.lies_apart();
                }
                if skipped < skip {
                    skipped += 1;
                    return true;
                }
                take(group.entry(&self.path, &self.keys))
            })
        };
        read().with_context(|| format!("cannot read {}", self.path.display()))
    }
}

/// Records of a plain tar file, by number.
pub(crate) struct TarSource {
    path: PathBuf,
    keys: RecordKeys,
    maker: Arc<SampleMaker>,
    file: Mutex<File>,
    groups: Vec<Group<Place>>,
}

impl TarSource {
    /// Reads the headers.
    pub(crate) fn open(path: &Path, keys: RecordKeys, maker: Arc<SampleMaker>) -> Result<Self> {
        let index = || {
            let file = File::open(path)?;
            let len = file.metadata()?.len();
            let (mut groups, mut last) = (Vec::new(), 0);
            let content = |entry: &mut tar::Entry<'_, _>, _: &str, _| {
                let (start, size) = (entry.raw_file_position(), entry.size());
                last = start.checked_add(size).filter(|end| *end <= len).context("is cut short")?;
                Ok(Place { start, size })
            };
            group(Archive::new(&file).entries_with_seek()?, content, &mut |group| {
                groups.push(group);
                true
            })?;
            ensure!(!groups.is_empty(), "it has no records");
            ensure!(len - last >= END_MARK, "it is cut short, an archive ends in blocks of zeros");
            let wordless: HashSet<_> = groups.iter().filter(|g| !g.has_words()).map(|g| g.name.clone()).collect();
            let apart = groups.iter_mut().filter(|group| group.is_words_alone() && wordless.contains(&group.name));
            apart.for_each(Group::lies_apart);
            Ok((file, groups))
        };
        let (file, groups) = index().with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { path: path.to_owned(), keys, maker, file: Mutex::new(file), groups })
    }

    fn entry(&self, index: u64) -> Result<Entry> {
        let group = self.groups.get(index as usize).context("there is no such record")?;
        let mut left = MAX_RECORD;
        let read = |(suffix, place): &(String, Place)| {
            let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            file.seek(SeekFrom::Start(place.start))?;
            let part = Part::read(suffix, place.size, &mut left, &mut *file);
            Ok((suffix.clone(), part.with_context(|| format!("{} has become shorter", self.path.display()))?))
        };
        let members = group.members.iter().map(read).collect::<Result<_>>()?;
        Group { name: group.name.clone(), members, fault: group.fault.clone() }.entry(&self.path, &self.keys)
    }
}

impl Source for TarSource {
    fn len(&self) -> Option<u64> {
        Some(self.groups.len() as u64)
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        self.entry(index)?.sample(&self.maker)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use image::{ImageFormat, Rgb, RgbImage};

    use super::*;
    use crate::files::RecordFiles;
    use crate::sample;

    /// Members by name, in a plain and in a compressed file.
    fn open(members: &[(&str, Vec<u8>)]) -> (tempfile::TempDir, [Arc<dyn Source>; 2]) {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, bytes) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            builder.append_data(&mut header, name, &bytes[..]).unwrap();
        }
        open_archive(&builder.into_inner().unwrap())
    }

    fn open_archive(archive: &[u8]) -> (tempfile::TempDir, [Arc<dyn Source>; 2]) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.tar"), archive).unwrap();
        let mut compressed = GzEncoder::new(Vec::new(), Compression::fast());
        compressed.write_all(archive).unwrap();
        fs::write(folder.path().join("b.tar.gz"), compressed.finish().unwrap()).unwrap();
        let open = |name| {
            let (path, image_folder) = (folder.path().join(name), PathBuf::new());
            let files = RecordFiles { path, image_folder, keys: RecordKeys::default() };
            files.open(&Arc::new(sample::tests::tiny())).unwrap().remove(0)
        };
        let sources = [open("a.tar"), open("b.tar.gz")];
        (folder, sources)
    }

    /// A picture whose red is `20 * number`.
    fn picture(number: u8, format: ImageFormat) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        RgbImage::from_pixel(8, 8, Rgb([20 * number, 0, 0])).write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn png(number: u8) -> Vec<u8> {
        picture(number, ImageFormat::Png)
    }

    fn talk(question: &str, answer: &str) -> Vec<u8> {
        let turns = serde_json::json!([{"from": "human", "value": question}, {"from": "gpt", "value": answer}]);
        serde_json::json!({ "conversations": turns }).to_string().into_bytes()
    }

    /// Id, numbers of the pictures, answer; or the error.
    fn seen(source: &dyn Source, index: u64) -> String {
        let sample = match source.sample(index) {
            Ok(sample) => sample,
            Err(error) => return format!("{error:#}"),
        };
        let number = |pixels: &vora_image::Pixels| ((pixels.data[0] * 0.229 + 0.485) * 255.0 / 20.0).round();
        format!(
            "{} {:?} {}",
            sample.id,
            sample.images.iter().map(number).collect::<Vec<_>>(),
            sample.questions[0].answer
        )
    }

    fn check(members: &[(&str, Vec<u8>)], expected: &[&str]) {
        let (_folder, sources) = open(members);
        for source in sources {
            for (index, expected) in expected.iter().enumerate() {
                let seen = seen(&*source, index as u64);
                assert!(seen.contains(expected), "`{seen}` lacks `{expected}`");
            }
        }
    }

    #[test]
    fn pictures_stand_in_the_order_of_their_numbers() {
        let names: Vec<_> = (0..12).map(|number| format!("rec.{number}.png")).collect();
        let question = "<image>".repeat(12);
        let mut members = vec![("rec.json", talk(&question, "The last one."))];
        members.extend(names.iter().enumerate().map(|(number, name)| (name.as_str(), png(number as u8))));
        members.swap(3, 9);
        let (_folder, sources) = open(&members);
        let expected: Vec<_> = (0..12).map(|number| number as f32).collect();
        for source in sources {
            let numbers = seen(&*source, 0);
            assert_eq!(numbers, format!("rec {expected:?} The last one."));
        }
        for (before, behind) in [("2.png", "10.png"), ("02.png", "10.png"), ("10.png", "png"), ("a2.png", "a10.png")] {
            assert_eq!((natural(before, behind), natural(behind, before)), (Ordering::Less, Ordering::Greater));
        }
    }

    #[test]
    fn names_are_split_as_webdataset_splits_them() {
        for (path, key) in [
            ("./0001.json", Some(("./0001", "json"))),
            ("a.b/0001.0.PNG", Some(("a.b/0001", "0.png"))),
            ("frame.0001.png", Some(("frame", "0001.png"))),
            ("./._0001.png", None),
            ("train/.DS_Store", None),
            ("__meta__/a.json", None),
            ("__a.b__", None),
            ("x/__meta__/a.json", Some(("x/__meta__/a", "json"))),
            ("README", None),
        ] {
            assert_eq!(split(path), key.map(|(name, suffix)| (name, suffix.to_owned())), "{path}");
        }
        // What a Mac's tar puts between.
        let mut members = Vec::new();
        for (name, bytes) in [
            ("0000.json", talk("What?", "Number 1.")),
            ("0000.png", png(1)),
            ("0001.json", talk("What?", "Number 2.")),
            ("0001.png", png(2)),
        ] {
            members.push((format!("./._{name}"), b"\x00\x05\x16\x07".to_vec()));
            members.push((format!("./{name}"), bytes));
        }
        let members: Vec<_> = members.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
        check(&members, &["0000 [1.0] Number 1.", "0001 [2.0] Number 2."]);
    }

    #[test]
    fn a_picture_is_known_by_its_first_bytes() {
        let mut avif = b"\0\0\0\x1cftypavif\0\0\0\0".to_vec();
        avif.resize(100, 0);
        check(
            &[
                ("0.jfif", picture(1, ImageFormat::Jpeg)),
                ("0.txt", b"One.".to_vec()),
                ("1.tif", picture(2, ImageFormat::Tiff)),
                ("1.txt", b"Two.".to_vec()),
                ("2.photo", picture(3, ImageFormat::Pnm)),
                ("2.txt", b"Three.".to_vec()),
                ("3.img", avif),
                ("3.json", talk("What?", "Four.")),
                ("4.png", b"<html>".to_vec()),
                ("4.json", talk("What?", "Five.")),
                ("5.mp4", b"\0\0\0\x18ftypmp42".to_vec()),
                ("5.json", talk("What?", "Six.")),
                ("6.cls", b"3".to_vec()),
                ("6.json", talk("What?", "Seven.")),
            ],
            &[
                "0 [1.0] One.",
                "1 [2.0] Two.",
                "2 [3.0] Three.",
                "record `3`: image 0: AVIF pictures are not supported",
                "record `4`: image 0: not a picture",
                "record `5`: its .mp4 is a video, which is not read yet",
                "6 [] Seven.",
            ],
        );
    }

    #[test]
    fn parts_that_do_not_go_together_are_bad_records() {
        let json = |text: &str| text.as_bytes().to_vec();
        check(
            &[
                ("frame.0001.png", png(1)),
                ("frame.0001.json", talk("What?", "Number 1.")),
                ("frame.0002.png", png(2)),
                ("frame.0002.json", talk("What?", "Number 2.")),
                ("twice.png", png(1)),
                ("twice.json", talk("What?", "Number 1.")),
                ("twice.png", png(2)),
                ("0001.png", png(1)),
                ("0002.cls", json("3")),
                ("0001.json", talk("What?", "Number 1.")),
                ("named.json", json(r#"{"images": ["a.png", "b.png"], "caption": "A."}"#)),
                ("named.png", png(3)),
                ("null.jpg", png(4)),
                ("null.json", json(r#"{"caption": null, "url": "u", "key": "0001", "exif": "{}"}"#)),
                ("null.txt", json("A red one.\n")),
                ("meta.json", talk("What?", "Whole.")),
                ("meta.stats.json", json("{}")),
                ("mark.json", [BYTE_ORDER_MARK, &talk("What?", "Marked.")].concat()),
                ("words.txt", [BYTE_ORDER_MARK, b"Words."].concat()),
                ("words.png", png(5)),
            ],
            &[
                "record `frame`: 2 of its members are words, `frame.0001.json` to `frame.0002.json`: a record's name ends at",
                "record `twice`: its .png comes twice",
                "record `0001`: it has no words",
                "record `0002`: it has no words: neither .json nor .txt is among its members .cls",
                "record `0001`: its words and its other members lie apart",
                "record `named`: it names 2 images, 1 lie beside it",
                "null [4.0] A red one.",
                "meta [] Whole.",
                "mark [] Marked.",
                "words [5.0] Words.",
            ],
        );
    }

    #[test]
    fn names_of_any_length_are_read_up_to_a_limit() {
        let long = format!("{}/0.json", "x".repeat(300));
        check(&[(&long, talk("What?", "Long."))], &["/0 [] Long."]);
        let mut archive = tar::Builder::new(Vec::new());
        let mut append = |name: &str, kind: u8, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(EntryType::new(kind));
            header.set_size(bytes.len() as u64);
            header.set_path(name).unwrap();
            header.set_cksum();
            archive.append(&header, bytes).unwrap();
        };
        append("././@LongLink", b'L', &vec![b'y'; MAX_NAME as usize + 1]);
        append("0.json", b'0', &talk("What?", "Lost."));
        append("PaxHeader", b'x', b"19 path=pax/1.json\n30 mtime=1700000000.123456789\n");
        append("cut.json", b'0', &talk("What?", "By its header."));
        append("PaxHeader", b'x', &vec![b' '; MAX_EXTENDED_HEADER as usize + 1]);
        append("2.json", b'0', &talk("What?", "Lost."));
        append("3.png", b'2', b"");
        append("3.json", b'0', &talk("What?", "Blind."));
        let (_folder, sources) = open_archive(&archive.into_inner().unwrap());
        for source in sources {
            for (index, expected) in [
                "record `0`: the name of its member has 4097 bytes, more than 4096",
                "pax/1 [] By its header.",
                "record `2`: the header before its member has 1048577 bytes",
                "record `3`: its .png is a link",
            ]
            .iter()
            .enumerate()
            {
                let seen = seen(&*source, index as u64);
                assert!(seen.contains(expected), "`{seen}` lacks `{expected}`");
            }
        }
    }
}
