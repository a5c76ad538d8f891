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
