//! Records in shards that are read from their start on: compressed tar files, row groups of parquet files.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, Result, anyhow};

use super::source::Source;
use crate::error::DataError;
use crate::maker::SampleMaker;
use crate::records::{Entry, Shard};
use crate::sample::Sample;
use crate::shuffle::Shuffle;

/// Records that are shuffled among each other, and read ahead; few in tests, which then have many windows.
const WINDOW: u64 = if cfg!(test) { 16 } else { 512 };

/// A window is cut before its records have more bytes than this; less in tests, which then cut some.
const WINDOW_BYTES: u64 = if cfg!(test) { 1 << 20 } else { 64 << 20 };

/// Full windows that stay in memory: workers are not all in the same one.
const WINDOWS: u64 = 3;

/// Bytes that stay in memory, beside the window that is being read: those of two large windows.
const KEPT_BYTES: u64 = 2 * WINDOW_BYTES;

/// Shards one after the other. Shuffled, they come in random order, and so do records within windows of 512, or of as
/// many as have 64 MiB.
pub(crate) struct ShardStream {
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
            Ok(entry) => self.maker.entry(entry),
            Err(message) => Err(anyhow!("{message}")),
        }
    }
}

/// What the reading thread says: the next records of one pass, and shards that were read through meanwhile, with how
/// many records they have.
struct Said {
    entries: Vec<Shared>,
    bytes: u64,
    lens: Vec<(usize, u64)>,
}

type Shared = Arc<std::result::Result<Entry, String>>;

/// Records of one pass in the order of their shards.
struct Window {
    start: u64, // place in the walk
    entries: Vec<Shared>,
    bytes: u64,
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

    /// Starts to read at the window of `place`, or at the walk's start where that window is not known yet.
    fn restart(&mut self, shards: &Arc<Vec<Box<dyn Shard>>>, place: u64, seed: Option<u64>) -> Result<()> {
        self.windows.clear();
        let len: Option<u64> = self.lens.iter().copied().sum();
        let (pass, skip) = match len {
            Some(len) if len > 0 => (place / len, place % len / WINDOW * WINDOW),
            _ => (0, 0),
        };
        self.windows.push_back(Window { start: pass * len.unwrap_or(0) + skip, entries: Vec::new(), bytes: 0 });
        self.seed = seed;
        let (sender, said) = sync_channel(0); // the reader has one window ahead in its hands, and no more
        self.said = Some(said);
        let (shards, lens) = (shards.clone(), self.lens.clone());
        let thread = thread::Builder::new().name("shards".to_owned());
        thread.spawn(move || read(&shards, &lens, pass, skip, seed, &sender)).context("starting to read shards")?;
        Ok(())
    }

    fn read_window(&mut self) -> Result<()> {
        let start = self.windows.back().map_or(0, |window| window.start + window.entries.len() as u64);
        let said = self.said.as_ref().context("no shard is being read")?;
        let Ok(Said { entries, bytes, lens }) = said.recv() else {
            self.said = None;
            return Err(DataError::no_records("the source of shards").into());
        };
        for (shard, len) in lens {
            self.lens[shard] = Some(len);
        }
        self.windows.push_back(Window { start, entries, bytes });
        let too_much = |windows: &VecDeque<Window>| {
            let records = windows.iter().map(|window| window.entries.len() as u64).sum::<u64>();
            records > WINDOWS * WINDOW || windows.iter().map(|window| window.bytes).sum::<u64>() > KEPT_BYTES
        };
        while self.windows.len() > 2 && too_much(&self.windows) {
            self.windows.pop_front();
        }
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

/// Cuts a pass into windows and hands them over.
struct Cutter<'a> {
    sender: &'a SyncSender<Said>,
    place: u64, // in the pass, of the next entry
    next: Said,
}

impl Cutter<'_> {
    /// False where nobody listens any more.
    fn push(&mut self, entry: Result<Entry>) -> bool {
        let size = entry.as_ref().map_or(0, Entry::size);
        if self.next.bytes + size > WINDOW_BYTES && !self.cut() {
            return false;
        }
        self.next.entries.push(Arc::new(entry.map_err(|error| format!("{error:#}"))));
        self.next.bytes += size;
        self.place += 1;
        // Always at these places too, so that reading may begin there.
        !self.place.is_multiple_of(WINDOW) || self.cut()
    }

    fn cut(&mut self) -> bool {
        if self.next.entries.is_empty() {
            return true;
        }
        let next = Said { entries: Vec::new(), bytes: 0, lens: Vec::new() };
        self.sender.send(std::mem::replace(&mut self.next, next)).is_ok()
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
    let mut cutter = Cutter { sender, place: skip, next: Said { entries: Vec::new(), bytes: 0, lens: Vec::new() } };
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
                wanted = cutter.push(entry);
                wanted
            };
            // The parquet crate may panic over a hostile file.
            let read = catch_unwind(AssertUnwindSafe(|| shards[shard].read(skip, &mut take)));
            if let Err(error) = read.unwrap_or_else(|_| Err(anyhow!("a shard made its reader panic"))) {
                take(Err(error.context("the rest of a shard is left out")));
            }
            // One that promised more keeps its length, or the places after it would be others.
            while wanted && lens[shard].is_some_and(|promised| len < promised) {
                len += 1;
                wanted = cutter.push(Err(anyhow!("left out with the rest of its shard")));
            }
            if !wanted {
                return;
            }
            cutter.next.lens.push((shard, len));
            (skip, found) = (0, found || len > 0);
        }
        if !found || !cutter.cut() {
            return;
        }
        cutter.place = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maker;
    use crate::records::{Record, Take};
    use crate::{Loader, LoaderConfig};

    /// Records `first..first + len`, the length known or not; then an error where it is broken.
    struct Counted {
        first: u64,
        len: u64,
        known: bool,
        broken: bool,
        bytes: usize, // that each holds
    }

    impl Counted {
        /// An image that nobody decodes, as no test of large records makes samples.
        fn images(&self) -> Vec<Vec<u8>> {
            if self.bytes > 0 { vec![vec![0; self.bytes]] } else { Vec::new() }
        }
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
                if !take(Ok(Entry { place: number.to_string(), record, images: self.images() })) {
                    return Ok(());
                }
            }
            anyhow::ensure!(!self.broken, "cut short");
            Ok(())
        }
    }

    fn stream(known: bool, broken: bool) -> Arc<ShardStream> {
        let shard = |first, len| {
            Box::new(Counted { first, len, known, broken: broken && first > 0, bytes: 0 }) as Box<dyn Shard>
        };
        let shards = vec![shard(0, 70), shard(70, 1), shard(71, 50), shard(121, 0)];
        Arc::new(ShardStream::new(shards, Arc::new(maker::tests::tiny())))
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
    fn windows_are_cut_by_bytes_and_begin_again_at_their_places() {
        let shard =
            || Box::new(Counted { first: 0, len: 40, known: true, broken: false, bytes: 300 << 10 }) as Box<dyn Shard>;
        let shards = Arc::new(vec![shard()]);
        let walk = |places: &[u64]| {
            let mut cursor = Cursor { lens: vec![Some(40)], ..Cursor::default() };
            let entry = |place: &u64| {
                let entry = cursor.entry(&shards, *place, Some(3)).unwrap();
                let kept: u64 = cursor.windows.iter().map(|window| window.bytes).sum();
                assert!(kept <= KEPT_BYTES && cursor.windows.iter().all(|window| window.bytes <= WINDOW_BYTES));
                entry.as_ref().as_ref().unwrap().record.id.parse::<u64>().unwrap()
            };
            places.iter().map(entry).collect::<Vec<_>>()
        };
        let places: Vec<_> = (0..80).collect();
        let whole = walk(&places);
        let mut pass = whole[..40].to_vec();
        assert!(pass[..3] != [0, 1, 2] || pass[3..6] != [3, 4, 5]); // three to a window, shuffled
        pass.sort_unstable();
        assert!(pass.into_iter().eq(0..40));
        for start in [5, 17, 33, 39, 41, 77] {
            assert_eq!(walk(&places[start..]), whole[start..], "from {start}");
        }
    }

    #[test]
    fn shards_of_nothing_say_so() {
        let shard = Counted { first: 0, len: 0, known: false, broken: false, bytes: 0 };
        let source = ShardStream::new(vec![Box::new(shard)], Arc::new(maker::tests::tiny()));
        let error = source.sample(0).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(DataError::NoRecords { .. })), "{error:#}");
    }
}
