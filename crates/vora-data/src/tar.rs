//! WebDataset's shards: tar files whose members of one name, up to the first dot, are one record.
//!
//! `a.json` is a conversation or holds a caption, `a.txt` is a caption, `a.jpg`, `a.png` or `a.webp` the image; several
//! are `a.0.jpg`, `a.1.jpg`. A plain tar file is indexed by its headers, a compressed one read as it comes.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};
use tar::{Archive, Entries};

use crate::record::{MAX_IMAGE_FILE, MAX_LINE, Record, RecordKeys};
use crate::sample::{Sample, SampleMaker};
use crate::shards::{Entry, Shard, Take};
use crate::source::Source;

/// No record has more members.
const MAX_MEMBERS: usize = 1000;

/// What follows the last member of a whole archive, at least.
const END_MARK: u64 = 512;

/// Members of one name: what stands behind it, and what is inside or where.
struct Group<P> {
    name: String,
    members: Vec<(String, P)>,
}

/// What a member is for, by what stands behind its record's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Json,
    Text,
    Image,
}

impl Part {
    fn of(suffix: &str) -> Option<Self> {
        match suffix.rsplit('.').next().unwrap_or_default() {
            "json" => Some(Self::Json),
            "txt" => Some(Self::Text),
            "jpg" | "jpeg" | "png" | "webp" | "gif" | "bmp" => Some(Self::Image),
            _ => None,
        }
    }

    fn most_bytes(self) -> u64 {
        if self == Self::Image { MAX_IMAGE_FILE } else { MAX_LINE }
    }
}

/// Groups members that follow each other; `content` looks into one of the wanted kinds. Stops where `take` returns
/// false.
fn group<R: Read, P>(
    entries: Entries<'_, R>,
    mut content: impl FnMut(&mut tar::Entry<'_, R>, Part) -> Result<P>,
    take: &mut dyn FnMut(Group<P>) -> bool,
) -> Result<()> {
    let mut open: Option<Group<P>> = None;
    for entry in entries {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let base = path.rfind('/').map_or(0, |slash| slash + 1);
        let Some(dot) = path[base..].find('.').map(|dot| base + dot) else { continue };
        let (name, suffix) = (&path[..dot], path[dot + 1..].to_lowercase());
        let Some(part) = Part::of(&suffix) else { continue };
        ensure!(entry.size() <= part.most_bytes(), "its member `{path}` has more than {} MiB", part.most_bytes() >> 20);
        if open.as_ref().is_some_and(|open| open.name != name)
            && let Some(closed) = open.take()
            && !take(closed)
        {
            return Ok(());
        }
        let open = open.get_or_insert_with(|| Group { name: name.to_owned(), members: Vec::new() });
        ensure!(open.members.len() < MAX_MEMBERS, "its record `{name}` has more than {MAX_MEMBERS} members");
        let content = content(&mut entry, part).with_context(|| format!("its member `{path}`"))?;
        open.members.push((suffix, content));
    }
    if let Some(closed) = open {
        take(closed);
    }
    Ok(())
}

impl Group<Vec<u8>> {
    fn entry(mut self, file: &Path, keys: &RecordKeys) -> Result<Entry> {
        let place = format!("{}: record `{}`", file.display(), self.name);
        self.members.sort_by(|(a, _), (b, _)| a.cmp(b));
        let (mut object, mut caption, mut images) = (Map::new(), None, Vec::new());
        let record = || {
            for (suffix, bytes) in self.members {
                match Part::of(&suffix) {
                    Some(Part::Json) => {
                        object = serde_json::from_slice(&bytes).with_context(|| format!("its .{suffix}"))?;
                    }
                    Some(Part::Text) => {
                        let text = String::from_utf8(bytes).with_context(|| format!("its .{suffix} is not UTF-8"))?;
                        caption = Some(text.trim().to_owned());
                    }
                    Some(Part::Image) => images.push(bytes),
                    None => {}
                }
            }
            let names_images = [keys.frames.as_str(), "image"]
                .iter()
                .any(|key| object.get(*key).is_some_and(|value| !value.is_null()));
            ensure!(!names_images || !images.is_empty(), "it names images, but none lies beside it");
            if let Some(caption) = caption {
                object.entry("caption").or_insert(Value::String(caption));
            }
            Record::with_images(object, keys, images.len())
        };
        let mut record = record().with_context(|| place.clone())?;
        if record.id.is_empty() {
            record.id = self.name;
        }
        Ok(Entry { place, record, images })
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
            let content = |entry: &mut tar::Entry<'_, _>, _| {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes)?;
                ensure!(bytes.len() as u64 == entry.size(), "is cut short");
                Ok(bytes)
            };
            let mut left = skip;
            group(archive.entries()?, content, &mut |group| {
                if left > 0 {
                    left -= 1;
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
    groups: Vec<Group<(u64, u64)>>, // start and length
}

impl TarSource {
    /// Reads the headers.
    pub(crate) fn open(path: &Path, keys: RecordKeys, maker: Arc<SampleMaker>) -> Result<Self> {
        let index = || {
            let file = File::open(path)?;
            let len = file.metadata()?.len();
            let (mut groups, mut last) = (Vec::new(), 0);
            let content = |entry: &mut tar::Entry<'_, _>, _| {
                let (start, size) = (entry.raw_file_position(), entry.size());
                last = start.checked_add(size).filter(|end| *end <= len).context("is cut short")?;
                Ok((start, size))
            };
            group(Archive::new(&file).entries_with_seek()?, content, &mut |group| {
                groups.push(group);
                true
            })?;
            ensure!(!groups.is_empty(), "it has no records");
            ensure!(len - last >= END_MARK, "it is cut short, an archive ends in blocks of zeros");
            Ok((file, groups))
        };
        let (file, groups) = index().with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { path: path.to_owned(), keys, maker, file: Mutex::new(file), groups })
    }

    fn entry(&self, index: u64) -> Result<Entry> {
        let group = self.groups.get(index as usize).context("there is no such record")?;
        let read = |(suffix, (start, len)): &(String, (u64, u64))| {
            let mut bytes = vec![0; *len as usize];
            let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            file.seek(SeekFrom::Start(*start))?;
            file.read_exact(&mut bytes).with_context(|| format!("{} has become shorter", self.path.display()))?;
            Ok((suffix.clone(), bytes))
        };
        let members = group.members.iter().map(read).collect::<Result<_>>()?;
        Group { name: group.name.clone(), members }.entry(&self.path, &self.keys)
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
