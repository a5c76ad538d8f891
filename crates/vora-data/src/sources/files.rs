//! From a path to sources: which files it names, and what is in them, by what they begin with.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use flate2::read::MultiGzDecoder;
use vora_files::refuse_compressed;

use super::conversations::ConversationSource;
use super::shards::ShardStream;
use super::source::Source;
use super::tar::TarSource;
use crate::maker::SampleMaker;
use crate::records::{Conversations, GzipTar, RecordKeys, Shard, TarIndex, row_groups};

/// What a shard's name ends in, in a folder of shards.
const SUFFIXES: [&str; 6] = [".json", ".jsonl", ".parquet", ".tar", ".tar.gz", ".tgz"];

/// What the names of compressed files end in.
const COMPRESSED: [&str; 7] = [".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z"];

/// What is read of compressed files.
const READ: &str = "of compressed files only tar.gz is read";

/// Where records are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordFiles {
    /// A file, a folder of shards, or a pattern such as `train-*.parquet`.
    pub path: PathBuf,
    /// The folder of the images that JSON names; empty for text alone.
    pub image_folder: PathBuf,
    /// What the records' own keys are called.
    pub keys: RecordKeys,
}

impl RecordFiles {
    /// Opens every file: one source for each that is indexed (JSON, plain tar), and one for all that are streamed
    /// (parquet, compressed tar).
    ///
    /// # Errors
    /// Where a file cannot be read or is none of these, by its compression where it has one; where the path names none.
    pub fn open(&self, maker: &Arc<SampleMaker>) -> Result<Vec<Arc<dyn Source>>> {
        let mut sources: Vec<Arc<dyn Source>> = Vec::new();
        let mut shards: Vec<Box<dyn Shard>> = Vec::new();
        let mut needs_images = false;
        for path in self.files()? {
            let keys = || self.keys.clone();
            match Format::of(&path)? {
                Format::Json => {
                    let conversations = Conversations::open(&path, &self.image_folder)?.with_keys(keys());
                    sources.push(Arc::new(ConversationSource::new(conversations, maker.clone())));
                    needs_images = true;
                }
                Format::Tar => sources.push(Arc::new(TarSource::new(TarIndex::open(&path, keys())?, maker.clone()))),
                Format::GzipTar => shards.push(Box::new(GzipTar { path, keys: keys() })),
                Format::Parquet => {
                    let groups = row_groups(&path, &self.keys)?.into_iter();
                    shards.extend(groups.map(|group| Box::new(group) as Box<dyn Shard>));
                }
            }
        }
        if !needs_images && !self.image_folder.as_os_str().is_empty() {
            tracing::warn!(
                "image_folder has no effect: the shards of {} hold their images themselves",
                self.path.display()
            );
        }
        if !shards.is_empty() {
            sources.push(Arc::new(ShardStream::new(shards, maker.clone())));
        }
        Ok(sources)
    }

    /// The files that the path names, by name.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let shown = self.path.display();
        if self.path.is_file() {
            return Ok(vec![self.path.clone()]);
        }
        let mut files = Vec::new();
        if self.path.is_dir() {
            for entry in fs::read_dir(&self.path).with_context(|| format!("cannot list {shown}"))? {
                let path = entry.with_context(|| format!("cannot list {shown}"))?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
                let plain = COMPRESSED.iter().find_map(|suffix| name.strip_suffix(suffix));
                let is_shard = |name: &str| SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
                // One that is compressed is not passed over: opening it says why it is not read.
                if path.is_file() && (is_shard(&name) || plain.is_some_and(is_shard)) {
                    files.push(path);
                }
            }
            files.sort();
            ensure!(!files.is_empty(), "{shown} has no shards: no file in it ends in {}", SUFFIXES.join(", "));
            return Ok(files);
        }
        let pattern = self.path.to_str().filter(|pattern| pattern.contains(['*', '?', '[']));
        let pattern = pattern.with_context(|| format!("cannot read {shown}: there is no such file or folder"))?;
        for path in glob::glob(pattern).with_context(|| format!("{shown} is no pattern of files"))? {
            let path = path.with_context(|| format!("cannot list {shown}"))?;
            if path.is_file() {
                files.push(path);
            }
        }
        ensure!(!files.is_empty(), "{shown} matches no file");
        Ok(files)
    }
}

/// What a file of records is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    Tar,
    GzipTar,
    Parquet,
}

impl Format {
    /// By content, whatever the file is called.
    fn of(path: &Path) -> Result<Self> {
        let mut start = Vec::new();
        let read = File::open(path).and_then(|file| file.take(512).read_to_end(&mut start));
        read.with_context(|| format!("cannot read {}", path.display()))?;
        Ok(match &start[..] {
            [b'P', b'A', b'R', b'1', ..] => Self::Parquet,
            [0x1f, 0x8b, ..] if holds_tar(path) => Self::GzipTar,
            start if start.get(257..262) == Some(b"ustar") => Self::Tar,
            start => {
                refuse_compressed(path, start, READ)?;
                Self::Json
            }
        })
    }
}

/// Whether what is compressed in a file begins as tar does, by the checksum of its header; so does what cannot be read, which is told
/// as a tar's fault.
fn holds_tar(path: &Path) -> bool {
    let mut header = Vec::new();
    let read = File::open(path).and_then(|file| MultiGzDecoder::new(file).take(512).read_to_end(&mut header));
    read.is_err() || header.get(148..154).is_some_and(|sum| sum.iter().all(|byte| b"01234567 \0".contains(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maker;
    use crate::sample::Sample;

    fn record_files(path: PathBuf) -> RecordFiles {
        RecordFiles { path, image_folder: PathBuf::new(), keys: RecordKeys::default() }
    }

    fn open(path: PathBuf) -> Result<Vec<Arc<dyn Source>>> {
        record_files(path).open(&Arc::new(maker::tests::tiny()))
    }

    fn golden(name: &str) -> PathBuf {
        fixtures::root().join("golden/record_files").join(name)
    }

    /// Number, answer and picture of a record belong together.
    fn check(sample: &Sample, number: usize) {
        assert_eq!(sample.questions.len(), 1);
        assert_eq!(sample.questions[0].answer, format!("Number {number}."));
        for pixels in &sample.images {
            // Back from the processor's mean and deviation: how red the picture is.
            let red = (pixels.data[0] * 0.229 + 0.485) * 255.0;
            assert!((red - 40.0 * number as f32).abs() < 4.0, "{red} at {number}");
        }
    }

    #[test]
    fn files_as_the_hub_has_them_are_read() {
        for (name, len, ids) in [
            ("conversations.parquet", 5, ["r0", "r3"]),
            ("caption.parquet", 2, ["caption.parquet: row 1", "caption.parquet: row 2"]),
            ("json.parquet", 2, ["json.parquet: row 1", "json.parquet: row 2"]),
            ("parts.parquet", 3, ["parts.parquet: row 1", "parts.parquet: row 3"]),
            ("id-uint64.parquet", 2, ["1", "18446744073709551615"]),
            ("id-double.parquet", 2, ["1.0", "2.5"]),
            ("id-binary.parquet", 2, ["x", "ff01"]),
            ("id-date.parquet", 2, ["1970-01-01", "1970-01-02"]),
            ("codec-gzip.parquet", 2, ["row 1", "row 2"]),
            ("codec-lz4.parquet", 2, ["row 1", "row 2"]),
            ("codec-brotli.parquet", 2, ["row 1", "row 2"]),
            ("shard.tar", 4, ["train/0000", "train/0003"]),
            ("shard.tar.gz", 4, ["train/0000", "train/0003"]),
        ] {
            let sources = open(golden(name)).unwrap();
            assert_eq!(sources.len(), 1);
            let source = &sources[0];
            assert_eq!(source.len(), (!name.ends_with("gz")).then_some(len), "{name}");
            for index in (0..len).rev().chain(0..len) {
                let sample = source.sample(index).unwrap();
                check(&sample, index as usize);
                assert_eq!(sample.images.len(), usize::from(index < 4), "{name}");
                if index == 0 || index == len.min(4) - 1 {
                    let id = ids[usize::from(index > 0)];
                    assert!(sample.id.ends_with(id), "{} is not {id}", sample.id);
                }
            }
        }
    }

    #[test]
    fn a_mark_in_a_row_of_text_alone_is_a_word() {
        let question = "What does <image> mean in HTML?";
        for (name, mark_is_word) in [("words.parquet", vec![true]), ("some-words.parquet", vec![true, false])] {
            let source = &open(golden(name)).unwrap()[0];
            for (index, mark_is_word) in mark_is_word.into_iter().enumerate() {
                let sample = source.sample(index as u64).unwrap();
                assert_eq!(sample.questions[0].question, question);
                assert_eq!(sample.images.len(), usize::from(!mark_is_word), "{name}, {index}");
                let told = sample.notes == ["it has a mark `<image>` and no picture: the mark is read as words"];
                assert_eq!(told, mark_is_word, "{:?}", sample.notes);
            }
        }
        // A list without pictures is one that lacks a picture.
        let error = format!("{:#}", open(golden("some-words.parquet")).unwrap()[0].sample(2).unwrap_err());
        assert!(error.contains("some-words.parquet: row 3: 1 places `<image>` in the questions, 0 images"), "{error}");
    }

    #[test]
    fn preferences_as_the_hub_has_them_are_pairs() {
        let (plain, pairs) = (maker::tests::tiny(), SampleMaker::of_pairs(maker::tests::tiny().preparation().clone()));
        let [plain, pairs] = [plain, pairs].map(|maker| {
            let mut sources = record_files(golden("preference.parquet")).open(&Arc::new(maker)).unwrap();
            sources.remove(0)
        });
        for index in 0..3 {
            let pair = pairs.sample(index).unwrap();
            let answers = pair.questions.iter().map(|asked| (asked.answer.clone(), asked.is_rejected));
            let expected = [(index, false), (index + 5, true)].map(|(n, rejected)| (format!("Number {n}."), rejected));
            assert!(answers.eq(expected), "{:?}", pair.questions);
            assert_eq!((&pair.questions[0].question, pair.images.len()), (&format!("<image>Which one is {index}?"), 1));
            check(&plain.sample(index).unwrap(), index as usize);
        }
    }

    #[test]
    fn columns_that_are_not_read_are_refused_by_name() {
        let error = format!("{:#}", open(golden("jpg.parquet")).err().unwrap());
        assert!(error.contains("its column `jpg` holds pictures") && error.contains("`frames_key: jpg`"), "{error}");
        let keys = RecordKeys { frames: "jpg".to_owned(), ..RecordKeys::default() };
        let files = RecordFiles { keys, ..record_files(golden("jpg.parquet")) };
        let sample = files.open(&Arc::new(maker::tests::tiny())).unwrap()[0].sample(1).unwrap();
        check(&sample, 1);
        assert_eq!(sample.images.len(), 1);
        let error = format!("{:#}", open(golden("bomb.parquet")).err().unwrap());
        assert!(error.contains("column `image.bytes` of row group 0 unpacks to 600 MiB from"), "{error}");
        let videos = &open(golden("videos.parquet")).unwrap()[0];
        assert!(videos.sample(0).unwrap().images.is_empty());
        let error = format!("{:#}", videos.sample(1).unwrap_err());
        assert!(error.contains("videos.parquet: row 2: its `videos` has a video"), "{error}");
    }

    #[test]
    fn a_path_may_name_many_files_and_names_do_not_say_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        for (name, to) in [
            ("conversations.parquet", "b.jsonl"),
            ("shard.tar", "a.json"),
            ("shard.tar.gz", "c.tar"),
            ("shard.tar", "x"),
        ] {
            fs::copy(golden(name), folder.path().join(to)).unwrap();
        }
        fs::write(
            folder.path().join("d.tar.gz"),
            r#" [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Number 0."}]}]"#,
        )
        .unwrap();
        let lens = |path| open(path).unwrap().iter().map(|source| source.len()).collect::<Vec<_>>();
        assert_eq!(lens(folder.path().to_owned()), [Some(4), Some(1), None]);
        assert_eq!(lens(folder.path().join("[ab].json*")), [Some(4), Some(5)]);
        let error = |path| format!("{:#}", open(path).err().unwrap());
        assert!(error(folder.path().join("*.parquet")).ends_with("matches no file"));
        assert!(error(folder.path().join("nowhere.json")).contains("nowhere.json: there is no such file"));
        assert!(error(fixtures::root().join("images")).contains("has no shards"));
    }

    #[test]
    fn broken_files_are_refused_by_name_wherever_they_end() {
        for name in ["conversations.parquet", "shard.tar", "shard.tar.gz"] {
            let whole = fs::read(golden(name)).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(name);
            for len in [300, whole.len() / 3, whole.len() * 2 / 5] {
                fs::write(&path, &whole[..len]).unwrap();
                let errors = match open(path.clone()) {
                    Err(error) => vec![format!("{error:#}")],
                    Ok(sources) => {
                        (0..5).filter_map(|n| sources[0].sample(n).err()).map(|e| format!("{e:#}")).collect()
                    }
                };
                assert!(errors.iter().any(|error| error.contains(name)), "{name} of {len} bytes: {errors:?}");
            }
            // Any byte may be wrong: that is an error or another record, and never a panic of the caller.
            for place in (0..whole.len()).step_by(whole.len() / 12 + 1) {
                let mut wrong = whole.clone();
                wrong[place] ^= 0x41;
                fs::write(&path, wrong).unwrap();
                if let Ok(sources) = open(path.clone()) {
                    for index in 0..5 {
                        let _ = sources[0].sample(index);
                    }
                }
            }
        }
    }

    #[test]
    fn a_member_that_is_too_large_is_a_bad_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large.tar");
        let mut header = ::tar::Header::new_gnu();
        header.set_path("a.json").unwrap();
        header.set_size(17 << 20);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(bytes.len() + (17 << 20) + 1024, 0);
        fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", open(path).unwrap()[0].sample(0).unwrap_err());
        assert!(error.contains("large.tar: record `a`: its .json has more than 16 MiB"), "{error}");
    }
}
