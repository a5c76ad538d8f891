//! Batches, made ahead of time by worker threads, in an order that does not depend on how many there are.

mod shared;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::batch::{Batch, collate_rows, collate_sharing};
use crate::error::{DataError, TooLong};
use crate::pack::OpenBatch;
use crate::sample::Sample;
use crate::sources::Source;

pub use shared::Peers;
use shared::Share;

/// As many bad samples in a row stop the run: then it is not the records that are wrong.
const MOST_BAD_IN_A_ROW: u64 = 100;

/// How a [`Loader`] walks its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderConfig {
    /// Rows of a batch; a sample each, where they are not packed.
    pub batch_size: usize,
    /// Tokens of a row that samples are packed into, as many as fit; none: they are not packed.
    pub row_len: Option<usize>,
    /// Whether the samples of a batch stand in one row where they are not packed, and what all begin with is there once.
    pub shares_starts: bool,
    /// Worker threads, at least 1.
    pub num_workers: usize,
    /// Whether the source is walked in random order, another one each pass; scenes are random already.
    pub shuffle: bool,
    /// Fixes that order.
    pub seed: u64,
    /// Whether a batch is either of samples with pictures or of text alone, as LLaVA's trainer groups them.
    pub group_by_modality: bool,
    /// Which of the processes that share the walk this one is, from 0.
    pub rank: u64,
    /// How many processes share the walk: each sample of it goes to one of them.
    pub world_size: u64,
    /// What rows are padded with.
    pub pad_id: i64,
    /// Where to start: what [`Loader::position`] said, or 0.
    pub start: u64,
    /// Samples from before `start` that are still to come: what [`Loader::held`] said, or none.
    pub held: Vec<u64>,
    /// Where to stop, the last batch being smaller where need be; none goes on for ever, from the start again after
    /// the source's end.
    pub end: Option<u64>,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        Self {
            batch_size: 8,
            row_len: None,
            shares_starts: false,
            num_workers: 1,
            shuffle: false,
            seed: 0,
            group_by_modality: false,
            rank: 0,
            world_size: 1,
            pad_id: 0,
            start: 0,
            held: Vec::new(),
            end: None,
        }
    }
}

impl LoaderConfig {
    /// The place in the walk of the `draw`-th sample that this process draws; none after the end.
    fn place(&self, draw: u64) -> Option<u64> {
        let place = match self.held.get(usize::try_from(draw).unwrap_or(usize::MAX)) {
            Some(held) => return Some(*held),
            None => {
                // The places of a rank are those of its remainder, wherever the walk starts.
                let first = (self.rank + self.world_size - self.start % self.world_size) % self.world_size;
                self.start + (draw - self.held.len() as u64) * self.world_size + first
            }
        };
        self.end.is_none_or(|end| place < end).then_some(place)
    }
}

/// An iterator of batches. Bad samples are told of by `tracing::warn`, counted and left out, and the next ones take
/// their places; a hundred in a row are an error.
pub struct Loader {
    config: LoaderConfig,
    source: Arc<dyn Source>,
    share: Share,
    workers: Vec<Worker>,
    drawn: u64,
    open: [OpenBatch; 2], // with pictures and without, where they are grouped
    num_skipped: u64,
    num_too_long: u64,
    num_bad_in_a_row: u64,
    noted: BTreeMap<String, u64>, // by what was noted, how often
    waited: Duration,
}

struct Worker {
    samples: Option<Receiver<Result<Sample>>>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts the workers.
    ///
    /// # Errors
    /// Where the config asks for no workers or for batches of nothing, or for a rank that is none; where the source
    /// is empty.
    pub fn new(source: Arc<dyn Source>, config: LoaderConfig) -> Result<Self> {
        Self::start(source, config, Share::Whole)
    }

    /// Starts the workers of a process that shares its walk with others, the ranks of `config.world_size`: the batches of
    /// all of them are together those of one process whose batches are as large as all of theirs, bad samples left out,
    /// rows packed and modalities grouped as there. Where it takes the samples themselves to know who gets which, packed or
    /// grouped, each process makes all of them and keeps its rows.
    ///
    /// # Errors
    /// As [`Loader::new`], and where the walk has an end.
    pub fn shared(source: Arc<dyn Source>, config: LoaderConfig, peers: Box<dyn Peers>) -> Result<Self> {
        let (share, config) = Share::of(&config, peers)?;
        Self::start(source, config, share)
    }

    fn start(source: Arc<dyn Source>, config: LoaderConfig, share: Share) -> Result<Self> {
        ensure!(config.batch_size > 0, "the batch size is 0, it must be at least 1");
        ensure!(config.row_len != Some(0), "the length of packed rows is 0, it must be at least 1");
        ensure!(config.num_workers > 0, "the number of data workers is 0, it must be at least 1");
        ensure!(config.rank < config.world_size, "rank {} of {} processes", config.rank, config.world_size);
        ensure!(!source.is_empty(), DataError::no_records("the data"));
        // Each worker is ahead by its share of two batches.
        let ahead = (2 * config.batch_size).div_ceil(config.num_workers);
        let workers = (0..config.num_workers)
            .map(|number| Worker::start(number as u64, ahead, source.clone(), config.clone()))
            .collect::<Result<_>>()?;
        let open = || OpenBatch::new(config.batch_size, config.row_len);
        Ok(Self {
            open: [open(), open()],
            config,
            source,
            share,
            workers,
            drawn: 0,
            num_skipped: 0,
            num_too_long: 0,
            num_bad_in_a_row: 0,
            noted: BTreeMap::new(),
            waited: Duration::ZERO,
        })
    }

    /// Where the walk goes on; a loader that starts there, with the samples that are [held](Self::held), gives the
    /// same batches from there on. It is the same on every rank that drew as many samples.
    pub fn position(&self) -> u64 {
        if let Share::Dealt(dealt) = &self.share {
            return dealt.position();
        }
        self.config.start + self.drawn.saturating_sub(self.config.held.len() as u64) * self.config.world_size
    }

    /// Samples that were drawn and stand in no batch yet, by their places in the walk: there are some only where
    /// batches are grouped or packed.
    pub fn held(&self) -> Vec<u64> {
        if let Share::Dealt(dealt) = &self.share {
            return dealt.held();
        }
        let open = self.open.iter().flat_map(OpenBatch::places);
        let mut held: Vec<_> = open.chain(self.config.held.iter().skip(self.drawn as usize).copied()).collect();
        held.sort_unstable();
        held
    }

    /// How many bad samples were left out so far.
    pub fn num_skipped(&self) -> u64 {
        self.num_skipped
    }

    /// How many of those had not even a first answer that fits.
    pub fn num_too_long(&self) -> u64 {
        self.num_too_long
    }

    /// What of good samples' records was not taken as it stands, and of how many so far.
    pub fn noted(&self) -> &BTreeMap<String, u64> {
        &self.noted
    }

    /// Counts a sample's notes, and tells of each at its 1st, 10th, 100th, .. time.
    fn note(&mut self, sample: &Sample) {
        for note in &sample.notes {
            let count = self.noted.entry(note.clone()).or_default();
            *count += 1;
            if 10_u64.pow(count.ilog10()) == *count {
                tracing::warn!("{note}: {count} records so far, the last is {}", sample.id);
            }
        }
    }

    /// How long the caller had to wait for samples so far.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    fn next_batch(&mut self) -> Result<Option<Batch>> {
        if let Share::Dealt(_) = self.share {
            return self.next_dealt();
        }
        while let Some((place, sample)) = self.next_good()? {
            let open = &mut self.open[usize::from(self.config.group_by_modality && sample.images.is_empty())];
            if let Some(rows) = open.push(place, sample) {
                return Ok(Some(self.collate(rows)));
            }
        }
        let rest = self.open.iter_mut().find(|open| !open.is_empty()).map(OpenBatch::take);
        Ok(rest.map(|rows| self.collate(rows)))
    }

    fn collate(&self, rows: Vec<Vec<Sample>>) -> Batch {
        let rows = self.share.of_rows(rows);
        let LoaderConfig { pad_id, row_len, shares_starts, .. } = self.config;
        if shares_starts && row_len.is_none() {
            return collate_sharing(rows.into_iter().flatten().collect(), pad_id);
        }
        collate_rows(rows, pad_id)
    }

    /// The next sample that is not bad, with its place in the walk; none after the end.
    fn next_good(&mut self) -> Result<Option<(u64, Sample)>> {
        while let Some(place) = self.config.place(self.drawn) {
            let sample = self.next_sample()?;
            self.drawn += 1;
            match sample {
                Ok(sample) => {
                    self.num_bad_in_a_row = 0;
                    self.note(&sample);
                    return Ok(Some((place, sample)));
                }
                Err(error) => {
                    tracing::warn!("skipped a bad record: {error:#}");
                    self.num_skipped += 1;
                    self.num_too_long += u64::from(is_too_long(&error));
                    self.count_bad_in_a_row(self.num_bad_in_a_row + 1, || error)?;
                }
            }
        }
        Ok(None)
    }

    fn count_bad_in_a_row(&mut self, count: u64, last: impl FnOnce() -> anyhow::Error) -> Result<()> {
        self.num_bad_in_a_row = count;
        if count >= MOST_BAD_IN_A_ROW {
            return Err(last().context(format!("{MOST_BAD_IN_A_ROW} bad records in a row, the last is")));
        }
        Ok(())
    }

    /// Samples are dealt to the workers in turn, so this knows who has the next.
    fn next_sample(&mut self) -> Result<Result<Sample>> {
        let turn = self.drawn % self.workers.len() as u64;
        let samples = self.workers[turn as usize].samples.as_ref().context("the loader has stopped")?;
        match samples.try_recv() {
            Ok(sample) => Ok(sample),
            Err(TryRecvError::Disconnected) => Err(anyhow!("a data worker has died")),
            Err(TryRecvError::Empty) => {
                let start = Instant::now();
                let sample = samples.recv().context("a data worker has died");
                self.waited += start.elapsed();
                sample
            }
        }
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_batch().transpose()
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // A worker whose samples nobody takes stops at its next one.
        for worker in &mut self.workers {
            worker.samples = None;
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                // Its own panics were caught; one that died otherwise has nothing left to say.
                let _ = thread.join();
            }
        }
    }
}

impl Worker {
    fn start(number: u64, ahead: usize, source: Arc<dyn Source>, config: LoaderConfig) -> Result<Self> {
        let (sender, samples) = sync_channel(ahead);
        let thread = thread::Builder::new().name(format!("data-{number}"));
        let thread =
            thread.spawn(move || work(number, &sender, &*source, &config)).context("starting a data worker")?;
        Ok(Self { samples: Some(samples), thread: Some(thread) })
    }
}

/// Makes this worker's samples until the walk ends or nobody wants them.
fn work(number: u64, sender: &SyncSender<Result<Sample>>, source: &dyn Source, config: &LoaderConfig) {
    let seed = config.shuffle.then_some(config.seed);
    for place in (number..).step_by(config.num_workers).map_while(|draw| config.place(draw)) {
        if sender.send(made(source, place, seed)).is_err() {
            return;
        }
    }
}

/// The sample at a place of the walk; a decoder that panics over a hostile file has only made a bad record.
fn made(source: &dyn Source, place: u64, seed: Option<u64>) -> Result<Sample> {
    catch_unwind(AssertUnwindSafe(|| source.walk(place, seed)))
        .unwrap_or_else(|_| Err(anyhow!("the data's sample {place} made its decoder panic")))
}

fn is_too_long(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<TooLong>())
}
