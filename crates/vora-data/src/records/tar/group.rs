//! Members of one name, which are one record.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use tar::{Entries, EntryType, PaxExtensions};

use super::member::{Ending, Part, natural, split};
use crate::records::entry::Entry;
use crate::records::keys::RecordKeys;
use crate::records::record::Record;

/// No record has more members.
const MAX_MEMBERS: usize = 1000;

/// No member's name is longer, as no path is that a system opens.
pub(super) const MAX_NAME: u64 = 4096;

/// No header that stands before a member's own is longer.
pub(super) const MAX_EXTENDED_HEADER: u64 = 1 << 20;

/// Members of one name: what each has after that name, and what is inside or where.
pub(super) struct Group<P> {
    pub(super) name: String,
    pub(super) members: Vec<(String, P)>,
    pub(super) fault: Option<String>, // why this is no record
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
pub(super) fn group<R: Read, P>(
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
    pub(super) fn has_words(&self) -> bool {
        self.members.iter().any(|(suffix, _)| Ending::of(suffix).is_words())
    }

    pub(super) fn is_words_alone(&self) -> bool {
        self.members.iter().all(|(suffix, _)| Ending::of(suffix).is_words())
    }

    pub(super) fn lies_apart(&mut self) {
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
    /// The record that the members are. `all_have_words` says that no record of the shard is one of pictures alone: then
    /// words without a picture beside them are text alone, and a mark in them is a word.
    pub(super) fn entry(mut self, file: &Path, keys: &RecordKeys, all_have_words: bool) -> Result<Entry> {
        let place = format!("{}: record `{}`", file.display(), self.name);
        let is_words_alone = all_have_words && self.is_words_alone();
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
            let record = match is_words_alone && !Record::has_place_for_pictures(&object, keys) {
                true => Record::of_words(object, keys)?,
                false => Record::with_images(object, keys, images.len())?,
            };
            Ok((record, images))
        };
        let (mut record, images) = record().with_context(|| place.clone())?;
        if record.id.is_empty() {
            record.id = self.name;
        }
        Ok(Entry { place, record, images })
    }
}
