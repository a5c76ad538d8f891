//! Tar files, plain and compressed.

use std::collections::HashSet;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use flate2::read::MultiGzDecoder;
use tar::Archive;

use super::group::{Group, group};
use super::member::Part;
use crate::error::DataError;
use crate::records::entry::{Entry, Shard, Take};
use crate::records::keys::RecordKeys;
use crate::records::limits::MAX_RECORD;

/// What follows the last member of a whole archive, at least.
const END_MARK: u64 = 512;

/// Where a member is in its file.
#[derive(Clone, Copy)]
struct Place {
    start: u64,
    size: u64,
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
                take(group.entry(&self.path, &self.keys, wordless.is_empty()))
            })
        };
        read().with_context(|| format!("cannot read {}", self.path.display()))
    }
}

/// Records of a plain tar file, by number.
pub(crate) struct TarIndex {
    path: PathBuf,
    keys: RecordKeys,
    file: Mutex<File>,
    groups: Vec<Group<Place>>,
    all_have_words: bool,
}

impl TarIndex {
    /// Reads the headers.
    pub(crate) fn open(path: &Path, keys: RecordKeys) -> Result<Self> {
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
            ensure!(!groups.is_empty(), DataError::no_records("it"));
            ensure!(len - last >= END_MARK, "it is cut short, an archive ends in blocks of zeros");
            let wordless: HashSet<_> = groups.iter().filter(|g| !g.has_words()).map(|g| g.name.clone()).collect();
            let apart = groups.iter_mut().filter(|group| group.is_words_alone() && wordless.contains(&group.name));
            apart.for_each(Group::lies_apart);
            Ok((file, groups, wordless.is_empty()))
        };
        let (file, groups, all_have_words) = index().with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { path: path.to_owned(), keys, file: Mutex::new(file), groups, all_have_words })
    }

    /// How many records there are, good and bad.
    pub(crate) fn len(&self) -> u64 {
        self.groups.len() as u64
    }

    /// Reads the record of this number with its images.
    pub(crate) fn entry(&self, index: u64) -> Result<Entry> {
        let group = self.groups.get(index as usize).context("there is no such record")?;
        let mut left = MAX_RECORD;
        let read = |(suffix, place): &(String, Place)| {
            let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            file.seek(SeekFrom::Start(place.start))?;
            let part = Part::read(suffix, place.size, &mut left, &mut *file);
            Ok((suffix.clone(), part.with_context(|| format!("{} has become shorter", self.path.display()))?))
        };
        let members = group.members.iter().map(read).collect::<Result<_>>()?;
        let group = Group { name: group.name.clone(), members, fault: group.fault.clone() };
        group.entry(&self.path, &self.keys, self.all_have_words)
    }
}

#[cfg(test)]
mod tests;
