//! Records in shards that are read from their start on: compressed tar files, row groups of parquet files.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, Result, anyhow};

use crate::record::Record;
use crate::sample::{Sample, SampleMaker};
use crate::shuffle::Shuffle;
use crate::source::Source;

/// Records that are shuffled among each other, and read ahead; few in tests, which then have many windows.
const WINDOW: u64 = if cfg!(test) { 16 } else { 512 };

/// Windows that stay in memory: workers are not all in the same one.
const WINDOWS: usize = 3;

/// A record with its images, undecoded.
#[derive(Debug)]
pub(crate) struct Entry {
    /// File, and where in it.
    pub(crate) place: String,
    pub(crate) record: Record,
    pub(crate) images: Vec<Vec<u8>>,
}

impl Entry {
    pub(crate) fn sample(&self, maker: &SampleMaker) -> Result<Sample> {
        let sample = || {
            let decode = |(idx, image): (usize, &Vec<u8>)| {
                vora_vision::decode_image(image).with_context(|| format!("image {idx}"))
            };
            let images = self.images.iter().enumerate().map(decode).collect::<Result<Vec<_>>>()?;
            maker.conversation(&self.record, &images)
        };
        sample().with_context(|| self.place.clone())
    }
}

/// Takes an entry; false where no more are wanted.
pub(crate) type Take<'a> = dyn FnMut(Result<Entry>) -> bool + 'a;

/// A file, or a part of one, that is read from its start on.
pub(crate) trait Shard: Send + Sync {
    /// How many records it has, where that is known without reading it.
    fn len(&self) -> Option<u64>;

    /// Hands over its records after the first `skip`, bad ones as errors. An error of its own ends it and counts as
    /// one more record.
    fn read(&self, skip: u64, take: &mut Take<'_>) -> Result<()>;
}

/// Shards one after the other. Shuffled, they come in random order, and so do records within windows of 512.
pub struct ShardStream {
    shards: Arc<Vec<Box<dyn Shard>>>,
    maker: Arc<SampleMaker>,
    in_order: Mutex<Cursor>,
    shuffled: Mutex<Cursor>,
}

impl ShardStream {
    pub(crate) fn new(shards: Vec<Box<dyn Shard>>, maker: Arc<SampleMaker>) -> Self {
        let lens: Vec<_> = shards.iter().map(|shard| shard.len()).collect();
        let cursor = || Mutex::new(Cursor { lens: lens.clone(), ..Cursor::default() });
        Self { in_order: cursor(), shuffled: cursor(), shards: Arc::new(shards), maker }
    }
}

impl Source for ShardStream {
    fn len(&self) -> Option<u64> {
        self.shards.iter().map(|shard| shard.len()).sum()
    }

    fn is_stream(&self) -> bool {
        true
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        self.walk(index, None)
    }

    fn walk(&self, place: u64, seed: Option<u64>) -> Result<Sample> {
        let cursor = if seed.is_some() { &self.shuffled } else { &self.in_order };
        let entry = cursor.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).entry(&self.shards, place, seed)?;
        match &*entry {
            Ok(entry) => entry.sample(&self.maker),
            Err(message) => Err(anyhow!("{message}")),
        }
    }
}

/// What the reading thread says.
enum Said {
    Entry(Result<Entry>),
    /// A shard was read through and has so many records.
    Len(usize, u64),
    PassEnd,
}

type Shared = Arc<std::result::Result<Entry, String>>;

/// Records of one pass in the order of their shards.
struct Window {
    start: u64, // place in the walk
    entries: Vec<Shared>,
}

/// Where a walk stands.
#[derive(Default)]
struct Cursor {
    seed: Option<u64>,
    said: Option<Receiver<Said>>,
    windows: VecDeque<Window>,
    lens: Vec<Option<u64>>, // of shards, as far as known
}

impl Cursor {
    fn entry(&mut self, shards: &Arc<Vec<Box<dyn Shard>>>, place: u64, seed: Option<u64>) -> Result<Shared> {
        let behind = self.windows.front().is_none_or(|window| place < window.start);
        // Far ahead, it is quicker to begin there, where it is known where that is.
        let next = self.windows.back().map_or(0, |window| window.start + window.entries.len() as u64);
        let far = place > next + WINDOW && self.lens.iter().all(Option::is_some);
        if self.said.is_none() || self.seed != seed || behind || far {
            self.restart(shards, place, seed)?;
        }
        loop {
            if let Some(window) = self.windows.iter().find(|window| window.contains(place)) {
                return Ok(window.entries[window.index(place, seed)].clone());
            }
            self.read_window()?;
        }
    }

    /// Starts to read at the window of `place`, or at the walk's start where nobody knows yet which one that is.
    fn restart(&mut self, shards: &Arc<Vec<Box<dyn Shard>>>, place: u64, seed: Option<u64>) -> Result<()> {
        self.windows.clear();
        let len: Option<u64> = self.lens.iter().copied().sum();
        let (pass, skip) = match len {
            Some(len) if len > 0 => (place / len, place % len / WINDOW * WINDOW),
            _ => (0, 0),
        };
        self.windows.push_back(Window { start: pass * len.unwrap_or(0) + skip, entries: Vec::new() });
        self.seed = seed;
        let (sender, said) = sync_channel(WINDOW as usize);
        self.said = Some(said);
        let (shards, lens) = (shards.clone(), self.lens.clone());
        let thread = thread::Builder::new().name("shards".to_owned());
        thread.spawn(move || read(&shards, &lens, pass, skip, seed, &sender)).context("starting to read shards")?;
        Ok(())
    }

    fn read_window(&mut self) -> Result<()> {
        let start = self.windows.back().map_or(0, |window| window.start + window.entries.len() as u64);
        let said = self.said.as_ref().context("no shard is being read")?;
        let mut entries = Vec::new();
        while entries.len() < WINDOW as usize {
            match said.recv() {
                Ok(Said::Entry(entry)) => entries.push(Arc::new(entry.map_err(|error| format!("{error:#}")))),
                Ok(Said::Len(shard, len)) => self.lens[shard] = Some(len),
                Ok(Said::PassEnd) if entries.is_empty() => {} // the window before it was full
                Ok(Said::PassEnd) => break,
                Err(_) => {
                    self.said = None;
                    return Err(anyhow!("the shards have no records"));
                }
            }
        }
        if self.windows.len() == WINDOWS {
            self.windows.pop_front();
        }
        self.windows.push_back(Window { start, entries });
        Ok(())
    }
}

impl Window {
    fn contains(&self, place: u64) -> bool {
        (self.start..self.start + self.entries.len() as u64).contains(&place)
    }

    fn index(&self, place: u64, seed: Option<u64>) -> usize {
        let offset = place - self.start;
        seed.map_or(offset, |seed| Shuffle::new(self.entries.len() as u64, seed, self.start).get(offset)) as usize
    }
}

/// Reads pass after pass until nobody listens.
fn read(
    shards: &[Box<dyn Shard>],
    lens: &[Option<u64>],
    first: u64,
    mut skip: u64,
    seed: Option<u64>,
    sender: &SyncSender<Said>,
) {
    for pass in first.. {
        let mut found = false;
        for turn in 0..shards.len() as u64 {
            let shard = seed.map_or(turn, |seed| Shuffle::new(shards.len() as u64, seed, pass).get(turn)) as usize;
            if let Some(len) = lens[shard].filter(|len| *len <= skip) {
                (skip, found) = (skip - len, found || len > 0);
                continue;
            }
            let (mut len, mut wanted) = (skip, true);
            let mut take = |entry| {
                len += 1;
                wanted = sender.send(Said::Entry(entry)).is_ok();
                wanted
            };
            // The parquet crate may panic over a hostile file.
            let read = catch_unwind(AssertUnwindSafe(|| shards[shard].read(skip, &mut take)));
            if let Err(error) = read.unwrap_or_else(|_| Err(anyhow!("a shard made its reader panic"))) {
                take(Err(error.context("the rest of a shard is left out")));
            }
            // One that promised more keeps its length, or the places behind it would be others.
            while wanted && lens[shard].is_some_and(|promised| len < promised) {
                len += 1;
                wanted = sender.send(Said::Entry(Err(anyhow!("left out with the rest of its shard")))).is_ok();
            }
            if !wanted || sender.send(Said::Len(shard, len)).is_err() {
                return;
            }
            (skip, found) = (0, found || len > 0);
        }
        if !found || sender.send(Said::PassEnd).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;
    use crate::{Loader, LoaderConfig};

    /// Records `first..first + len`, the length known or not; then an error where it is broken.
    struct Counted {
        first: u64,
        len: u64,
        known: bool,
        broken: bool,
    }

    impl Shard for Counted {
        fn len(&self) -> Option<u64> {
            self.known.then_some(self.len)
        }

        fn read(&self, skip: u64, take: &mut Take<'_>) -> Result<()> {
            for number in self.first + skip..self.first + self.len {
                let line = format!(
                    r#"{{"id": {number}, "conversations": [{{"from": "user", "value": "a"}},
                    {{"from": "gpt", "value": "b"}}]}}"#
                );
                let record = Record::parse(line.as_bytes(), &crate::RecordKeys::default())?;
                if !take(Ok(Entry { place: number.to_string(), record, images: Vec::new() })) {
                    return Ok(());
                }
            }
            anyhow::ensure!(!self.broken, "cut short");
            Ok(())
        }
    }

    fn stream(known: bool, broken: bool) -> Arc<ShardStream> {
        let shard = |first, len| Box::new(Counted { first, len, known, broken: broken && first > 0 }) as Box<dyn Shard>;
        let shards = vec![shard(0, 70), shard(70, 1), shard(71, 50), shard(121, 0)];
        Arc::new(ShardStream::new(shards, Arc::new(sample::tests::tiny())))
    }

    fn ids(source: &Arc<ShardStream>, config: &LoaderConfig, samples: usize) -> (Vec<u64>, u64) {
        let config = LoaderConfig { batch_size: 10, ..config.clone() };
        let mut loader = Loader::new(source.clone(), config).unwrap();
        let batches = loader.by_ref().take(samples / 10).map(|batch| batch.unwrap());
        let ids = batches.flat_map(|b| b.samples).map(|sample| sample.id.parse().unwrap()).collect();
        (ids, loader.position())
    }

    #[test]
    fn every_pass_has_each_record_once_whoever_counts() {
        let config = LoaderConfig { shuffle: true, seed: 4, num_workers: 2, ..LoaderConfig::default() };
        let (known, _) = ids(&stream(true, false), &config, 240);
        let (unknown, _) = ids(&stream(false, false), &config, 240);
        assert_eq!(known, unknown);
        let mut pass = known[..121].to_vec();
        assert_ne!(pass[..100], known[121..221]);
        pass.sort_unstable();
        assert!(pass.into_iter().eq(0..121));
        let in_order = LoaderConfig { shuffle: false, ..config };
        assert!(ids(&stream(false, false), &in_order, 240).0.into_iter().eq((0..240).map(|n| n % 121)));
    }

    #[test]
    fn a_stream_resumes_in_any_pass_and_for_any_number_of_workers() {
        for (known, broken) in [(true, false), (false, false), (false, true)] {
            let config = LoaderConfig { shuffle: true, seed: 8, ..LoaderConfig::default() };
            let (whole, _) = ids(&stream(known, broken), &config, 250);
            for samples in [10, 50, 100, 130, 200] {
                let (mut parts, start) = ids(&stream(known, broken), &config, samples);
                let rest = LoaderConfig { start, num_workers: 3, ..config.clone() };
                parts.extend(ids(&stream(known, broken), &rest, 250 - samples).0);
                assert!(parts == whole, "{known} {broken} {samples}");
            }
        }
    }

    #[test]
    fn a_broken_shard_is_a_bad_record_and_the_others_go_on() {
        let source = stream(false, true);
        let message = format!("{:#}", source.sample(71).unwrap_err());
        assert_eq!(message, "the rest of a shard is left out: cut short");
        assert_eq!(source.sample(72).unwrap().id, "71");
        assert_eq!(source.sample(3).unwrap().id, "3");
    }

    #[test]
    fn shards_of_nothing_say_so() {
        let shard = Counted { first: 0, len: 0, known: false, broken: false };
        let source = ShardStream::new(vec![Box::new(shard)], Arc::new(sample::tests::tiny()));
        assert_eq!(source.sample(0).unwrap_err().to_string(), "the shards have no records");
    }
}
