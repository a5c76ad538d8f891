//! One walk over the data that several processes share: together their batches are the batch of one process, whatever
//! their number, record for record.

use std::collections::{BTreeSet, VecDeque};

use anyhow::{Result, ensure};

use super::{Loader, LoaderConfig};
use crate::batch::Batch;
use crate::sample::Sample;

/// What the processes that share a walk tell each other.
pub trait Peers: Send {
    /// What each has to say, by rank; all of them call it at the same place.
    ///
    /// # Errors
    /// Where one of them is gone.
    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;
}

/// Which part of a batch this process makes.
pub(super) enum Share {
    /// All of it.
    Whole,
    /// So many rows from this one on. What stands in which row shows only once all samples before it are there: each
    /// process makes every sample.
    Rows { first: usize, len: usize },
    /// A row for each place of the walk, which the processes make in turn.
    Dealt(Dealt),
}

/// The places of a walk, dealt to processes.
pub(super) struct Dealt {
    peers: Box<dyn Peers>,
    rank: u64,
    world_size: u64,
    next: u64,
    held: VecDeque<u64>, // that come before
}

impl Share {
    /// The share of `config.rank`, and how this process walks for it.
    pub(super) fn of(config: &LoaderConfig, peers: Box<dyn Peers>) -> Result<(Self, LoaderConfig)> {
        let LoaderConfig { rank, world_size, batch_size, .. } = *config;
        ensure!(rank < world_size, "rank {rank} of {world_size} processes");
        ensure!(config.end.is_none(), "a walk that is shared has no end");
        if config.row_len.is_some() || config.group_by_modality {
            let share = Self::Rows { first: rank as usize * batch_size, len: batch_size };
            let batch_size = batch_size * world_size as usize;
            return Ok((share, LoaderConfig { rank: 0, world_size: 1, batch_size, ..config.clone() }));
        }
        let held = config.held.iter().copied().collect();
        let dealt = Dealt { peers, rank, world_size, next: config.start, held };
        // A process makes ahead those places that it is dealt while no record is bad.
        Ok((Self::Dealt(dealt), LoaderConfig { held: Vec::new(), ..config.clone() }))
    }

    /// The rows of this process.
    pub(super) fn of_rows(&self, rows: Vec<Vec<Sample>>) -> Vec<Vec<Sample>> {
        match self {
            Self::Rows { first, len } => rows.into_iter().skip(*first).take(*len).collect(),
            Self::Whole | Self::Dealt(_) => rows,
        }
    }
}

impl Dealt {
    pub(super) fn position(&self) -> u64 {
        self.next
    }

    pub(super) fn held(&self) -> Vec<u64> {
        self.held.iter().copied().collect()
    }

    fn draw(&mut self) -> u64 {
        self.held.pop_front().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// The next places with the ranks that make them, `batch_size` each.
    fn deal(&mut self, batch_size: u64) -> Vec<(u64, u64)> {
        let by_turns = self.held.is_empty();
        let world_size = self.world_size;
        let owner = |number: u64, place: u64| if by_turns { place % world_size } else { number / batch_size };
        let deal = |number| {
            let place = self.draw();
            (place, owner(number, place))
        };
        (0..batch_size * world_size).map(deal).collect()
    }
}

impl Loader {
    /// This process's part of the next batch: its samples in the order of the walk. A bad sample's place is taken by the
    /// next one of the walk, which is made by the process that lacks one.
    pub(super) fn next_dealt(&mut self) -> Result<Option<Batch>> {
        let Share::Dealt(dealt) = &mut self.share else { return Ok(None) };
        let rank = dealt.rank;
        let mut places = dealt.deal(self.config.batch_size as u64);
        let mut mine: Vec<(u64, Sample)> = Vec::new();
        loop {
            let (mut bad, mut last_error) = (Vec::new(), None);
            for (place, _) in places.iter().filter(|(_, owner)| *owner == rank) {
                match self.sample_at(*place)? {
                    Ok(sample) => {
                        self.note(&sample);
                        mine.push((*place, sample));
                    }
                    Err(error) => {
                        tracing::warn!("skipped a bad record: {error:#}");
                        bad.push((*place, super::is_too_long(&error)));
                        last_error = Some(error);
                    }
                }
            }
            let Share::Dealt(dealt) = &mut self.share else { return Ok(None) };
            let said: Vec<u8> =
                bad.iter().flat_map(|(place, too_long)| (place << 1 | u64::from(*too_long)).to_le_bytes()).collect();
            let of_ranks = dealt.peers.all_gather(&said)?;
            let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
            let of_ranks: Vec<Vec<u64>> = of_ranks.iter().map(|said| said.chunks(8).map(number).collect()).collect();
            let all_bad: BTreeSet<u64> = of_ranks.iter().flatten().map(|bad| bad >> 1).collect();
            let lacking: Vec<u64> = (0..).zip(&of_ranks).flat_map(|(rank, bad)| vec![rank; bad.len()]).collect();
            let substitutes: Vec<_> = lacking.into_iter().map(|owner| (dealt.draw(), owner)).collect();
            self.num_skipped += all_bad.len() as u64;
            self.num_too_long += of_ranks.iter().flatten().filter(|bad| **bad & 1 == 1).count() as u64;
            for (place, _) in &places {
                let in_a_row = if all_bad.contains(place) { self.num_bad_in_a_row + 1 } else { 0 };
                self.count_bad_in_a_row(in_a_row, || {
                    last_error
                        .take()
                        .unwrap_or_else(|| anyhow::anyhow!("number {place} of the walk, as another rank says"))
                })?;
            }
            if substitutes.is_empty() {
                break;
            }
            places = substitutes;
        }
        mine.sort_by_key(|(place, _)| *place);
        Ok(Some(self.collate(mine.into_iter().map(|(_, sample)| vec![sample]).collect())))
    }

    /// The sample at a place: one that was made ahead, or else made now.
    fn sample_at(&mut self, place: u64) -> Result<Result<Sample>> {
        while let Some(ahead) = self.config.place(self.drawn).filter(|ahead| *ahead <= place) {
            let sample = self.next_sample()?;
            self.drawn += 1;
            if ahead == place {
                return Ok(sample);
            }
            // Another process made it, in place of a bad one of its own.
        }
        Ok(super::made(&*self.source, place, self.config.shuffle.then_some(self.config.seed)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier, Mutex};
    use std::thread;

    use super::*;
    use crate::sources::{Numbers, Source};

    /// Processes that are threads.
    #[derive(Clone)]
    struct Threads {
        rank: usize,
        said: Arc<Mutex<Vec<Vec<u8>>>>,
        barrier: Arc<Barrier>,
    }

    impl Peers for Threads {
        fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
            self.said.lock().unwrap()[self.rank] = mine.to_vec();
            self.barrier.wait();
            let all = self.said.lock().unwrap().clone();
            self.barrier.wait();
            Ok(all)
        }
    }

    /// Samples of 1 to 7 tokens, of which every third has a picture.
    struct Lengths(Numbers);

    impl Source for Lengths {
        fn len(&self) -> Option<u64> {
            Some(40)
        }
        fn sample(&self, index: u64) -> Result<Sample> {
            let mut sample = self.0.sample(index)?;
            let len = 1 + (index * 5 % 7) as usize;
            (sample.input_ids, sample.targets) = (vec![index as i64; len], vec![0; len]);
            sample.spans = vec![vora_text::Span::text(len as i64)];
            if index.is_multiple_of(3) {
                sample.images.push(vora_image::Pixels { data: vec![0.0; 3], height: 1, width: 1 });
            }
            Ok(sample)
        }
    }

    fn source() -> Arc<dyn Source> {
        Arc::new(Lengths(Numbers { len: None, bad: vec![3, 4, 5, 6, 17, 30] }))
    }

    fn ids(batch: &Batch) -> Vec<String> {
        batch.samples.iter().map(|sample| sample.id.clone()).collect()
    }

    /// The ids of a rank's batches, and where its loader stands afterwards: position, what it holds, records left out.
    type Walked = (Vec<Vec<String>>, u64, Vec<u64>, u64);

    /// Each rank's walk.
    fn run(config: &LoaderConfig, world_size: usize, batches: usize) -> Vec<Walked> {
        let said = Arc::new(Mutex::new(vec![Vec::new(); world_size]));
        let barrier = Arc::new(Barrier::new(world_size));
        let rank = |rank| {
            let config = LoaderConfig { rank: rank as u64, world_size: world_size as u64, ..config.clone() };
            let peers = Threads { rank, said: Arc::clone(&said), barrier: Arc::clone(&barrier) };
            move || {
                let mut loader = Loader::shared(source(), config, Box::new(peers)).unwrap();
                let found = loader.by_ref().take(batches).map(|batch| ids(&batch.unwrap())).collect();
                (found, loader.position(), loader.held(), loader.num_skipped())
            }
        };
        let threads: Vec<_> = (0..world_size).map(|number| thread::spawn(rank(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    #[test]
    fn together_they_make_the_batches_of_one_process() {
        let plain = LoaderConfig { shuffle: true, seed: 3, num_workers: 2, ..LoaderConfig::default() };
        let packed = LoaderConfig { row_len: Some(9), ..plain.clone() };
        let grouped = LoaderConfig { group_by_modality: true, ..plain.clone() };
        for (config, is_dealt) in [(plain, true), (packed, false), (grouped, false)] {
            for (world_size, batch_size) in [(2, 3), (3, 2), (6, 1), (1, 6)] {
                let whole = LoaderConfig { batch_size: 6, ..config.clone() };
                let mut one = Loader::new(source(), whole).unwrap();
                let expected: Vec<_> = one.by_ref().take(30).map(|batch| ids(&batch.unwrap())).collect();
                let ranks = run(&LoaderConfig { batch_size, ..config.clone() }, world_size, 30);
                for (number, expected) in expected.iter().enumerate() {
                    let of_rank = ranks.iter().map(|(batches, ..)| batches[number].clone());
                    assert!(!is_dealt || of_rank.clone().all(|ids| ids.len() == batch_size));
                    let (mut found, mut expected) = (of_rank.flatten().collect::<Vec<_>>(), expected.clone());
                    found.sort();
                    expected.sort();
                    assert_eq!(found, expected, "batch {number} of {world_size} ranks");
                }
                for (_, position, held, num_skipped) in ranks {
                    assert_eq!((position, held, num_skipped), (one.position(), one.held(), one.num_skipped()));
                }
            }
        }
    }

    #[test]
    fn a_shared_walk_goes_on_with_any_number_of_ranks() {
        let plain = LoaderConfig { shuffle: true, seed: 3, ..LoaderConfig::default() };
        for row_len in [None, Some(9)] {
            let config = |batch_size| LoaderConfig { batch_size, row_len, ..plain.clone() };
            let whole = run(&config(2), 3, 12);
            for stop in [1, 5, 8] {
                let (_, start, held, _) = run(&config(2), 3, stop).remove(0);
                let rest = run(&LoaderConfig { start, held: held.clone(), ..config(2) }, 3, 12 - stop);
                for (whole, rest) in whole.iter().zip(&rest) {
                    assert_eq!(whole.0[stop..], rest.0); // the same for each rank
                }
                let mut other = run(&LoaderConfig { start, held, ..config(3) }, 2, 12 - stop);
                let two = other.remove(1).0.into_iter().zip(other.remove(0).0).map(|(a, b)| [a, b].concat());
                let three = (stop..12).map(|batch| whole.iter().flat_map(|rank| rank.0[batch].clone()).collect());
                for (mut two, mut three) in two.zip::<Vec<Vec<String>>>(three.collect()) {
                    two.sort();
                    three.sort();
                    assert_eq!(two, three);
                }
            }
        }
        // What a packed walk held comes first where the rows are not packed any more.
        let held = LoaderConfig { batch_size: 2, start: 20, held: vec![7, 11, 13], ..LoaderConfig::default() };
        let ranks = run(&held, 2, 2);
        assert_eq!([&ranks[0].0, &ranks[1].0], [&[["7", "11"], ["22", "24"]], &[["13", "20"], ["21", "23"]]]);
    }

    #[test]
    fn nothing_but_bad_records_ends_all() {
        let said = Arc::new(Mutex::new(vec![Vec::new(); 2]));
        let barrier = Arc::new(Barrier::new(2));
        let rank = |rank: usize| {
            let peers = Threads { rank, said: Arc::clone(&said), barrier: Arc::clone(&barrier) };
            let source = Arc::new(Numbers { len: None, bad: (5..200).collect() });
            let config = LoaderConfig { batch_size: 2, rank: rank as u64, world_size: 2, ..LoaderConfig::default() };
            move || {
                let mut loader = Loader::shared(source, config, Box::new(peers)).unwrap();
                loader.next().unwrap().unwrap();
                format!("{:#}", loader.next().unwrap().unwrap_err())
            }
        };
        let threads = [0, 1].map(|number| thread::spawn(rank(number)));
        for thread in threads {
            let error = thread.join().unwrap();
            assert!(error.starts_with("100 bad records in a row, the last is:"), "{error}");
        }
    }
}
