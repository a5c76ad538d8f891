//! What processes that train together send each other, on paper: bytes a step by number of processes and by strategy.

use std::fmt;

use serde::Serialize;

use super::size::{Size, mebibytes};
use super::table::{right, table};

/// What a step sends and what a process holds, for numbers of processes that double.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Scale {
    /// Seconds that a process computes for a step: measured, or those of [`Size::flops`] at `tera_flops`.
    pub seconds_per_step: f64,
    /// What each device is taken to compute in a second, in 10^12 operations; none where steps were measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tera_flops: Option<f64>,
    /// One for each number of processes and each strategy.
    pub rows: Vec<Scaled>,
}

/// A number of processes, and a strategy.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Scaled {
    /// Processes.
    pub world_size: u64,
    /// The run file's `zero_stage`.
    pub zero_stage: u64,
    /// Bytes of gradients that a process sends a step: a ring all-reduce of `n` bytes sends `2 n (N - 1) / N`.
    pub gradients: u64,
    /// Bytes of changed weights that a process gets a step: `n (N - 1) / N`.
    pub weights: u64,
    /// Bytes of frozen weights that a process gets a step: `n (N - 1) / N` on the way forward and on the way back, for each of
    /// `gradient_accumulation_steps`.
    pub gathered: u64,
    /// Bytes of AdamW's running means that a process holds: those of one tensor at least.
    pub optimizer: u64,
    /// Bytes that a process takes in all: as [`Memory`](super::size::Memory) counts them, or, where steps were measured, their
    /// peak without what other processes hold.
    pub memory: u64,
    /// Bytes a second below which what is sent takes longer than the computing.
    pub bandwidth: f64,
}

/// What a device is taken to compute where nothing was measured: bandwidths are in proportion.
const TERA_FLOPS: f64 = 100.0;

impl Scale {
    /// For 2, 4, 8, .. up to `world_size` processes, each of which takes as long for a step as `measured`, and `peak_memory`
    /// but for what others hold.
    pub(super) fn new(size: &Size, world_size: u64, measured: Option<f64>, peak_memory: Option<u64>) -> Self {
        let counted = size.memory.total();
        let seconds_per_step = measured.unwrap_or(size.flops as f64 / (TERA_FLOPS * 1e12));
        let trained = size.memory.gradients;
        let shared: u64 = size.blocks.iter().map(|blocks| blocks.count * blocks.frozen).sum();
        let stages = if shared > 0 { &[0, 1, 3][..] } else { &[0, 1] };
        let doubled = std::iter::successors(Some(2), |n| Some(2 * n)).take_while(|n| *n < world_size);
        let row = |(n, zero_stage): (u64, u64)| {
            let others = |bytes: u64| (u128::from(bytes) * u128::from(n - 1) / u128::from(n)) as u64;
            let gradients = others(2 * trained);
            let weights = if zero_stage == 0 { 0 } else { others(trained) };
            let gathered = if zero_stage == 3 { 2 * size.passes * others(shared) } else { 0 };
            let memory = size.of_each(n, zero_stage);
            let (optimizer, memory) = (memory.optimizer, memory.total());
            let memory = peak_memory.map_or(memory, |peak| (peak + memory).saturating_sub(counted));
            let bandwidth = (gradients + weights + gathered) as f64 / seconds_per_step;
            Scaled { world_size: n, zero_stage, gradients, weights, gathered, optimizer, memory, bandwidth }
        };
        let numbers = doubled.chain([world_size]);
        let rows = numbers.flat_map(|n| stages.iter().map(move |stage| (n, *stage))).map(row).collect();
        Self { seconds_per_step, tera_flops: measured.is_none().then_some(TERA_FLOPS), rows }
    }
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = table(&[
            "processes",
            "zero_stage",
            "gradients sent a step",
            "weights got",
            "frozen got",
            "optimizer of each",
            "memory of each",
            "bandwidth",
        ]);
        for Scaled { world_size, zero_stage, gradients, weights, gathered, optimizer, memory, bandwidth } in &self.rows
        {
            let numbers = [world_size.to_string(), zero_stage.to_string()];
            let bytes = [gradients, weights, gathered, optimizer, memory].map(|bytes| mebibytes(*bytes));
            rows.add_row(numbers.into_iter().chain(bytes).chain([format!("{:.3} GB/s", bandwidth / 1e9)]));
        }
        writeln!(f, "{}", right(rows))?;
        write!(
            f,
            "below that bandwidth of each process a step of {:.3} s waits longer for the network than it computes",
            { self.seconds_per_step }
        )?;
        match self.tera_flops {
            Some(tera) => {
                write!(f, "; nothing was measured: each device computes {tera} TFLOP/s, and is in proportion else")
            }
            None => Ok(()),
        }
    }
}
