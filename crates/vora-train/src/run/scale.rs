//! What processes that train together send each other, on paper: bytes a step by number of processes and by strategy.

use std::fmt;

use serde::Serialize;

use super::size::{Size, mebibytes};
use super::table::{right, table};

/// What a step sends and what a process holds of the optimizer, for numbers of processes that double.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Scale {
    /// Bytes of the gradient of one layer of the LLM with adapters, the first of each module counted; 0 without adapters.
    pub gradient_per_layer: u64,
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
    /// Bytes of AdamW's running means that a process holds.
    pub optimizer: u64,
    /// Bytes a second below which that takes longer than the computing; none where no step was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<f64>,
}

impl Scale {
    /// For 2, 4, 8, .. up to `world_size` processes, each of which takes `seconds_per_step` to compute.
    pub(super) fn new(size: &Size, world_size: u64, seconds_per_step: Option<f64>) -> Self {
        let (bytes, means) = (size.memory.gradients, size.memory.optimizer);
        let doubled = std::iter::successors(Some(2), |n| Some(2 * n)).take_while(|n| *n < world_size);
        let row = |(n, zero_stage): (u64, u64)| {
            let others = |bytes: u64| (u128::from(bytes) * u128::from(n - 1) / u128::from(n)) as u64;
            let (gradients, weights) = (others(2 * bytes), if zero_stage == 0 { 0 } else { others(bytes) });
            let optimizer = if zero_stage == 0 { means } else { means / n };
            let bandwidth = seconds_per_step.map(|seconds| (gradients + weights) as f64 / seconds);
            Scaled { world_size: n, zero_stage, gradients, weights, optimizer, bandwidth }
        };
        let rows = doubled.chain([world_size]).flat_map(|n| [(n, 0), (n, 1)]).map(row).collect();
        let of_llm = size.adapters.iter().filter(|adapted| !adapted.part.starts_with("vision"));
        let gradient_per_layer = of_llm.map(|adapted| 4 * adapted.parameters / adapted.linears.max(1)).sum();
        Self { gradient_per_layer, rows }
    }
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = table(&[
            "processes",
            "zero_stage",
            "gradients sent a step",
            "weights got",
            "optimizer of each",
            "bandwidth",
        ]);
        for Scaled { world_size, zero_stage, gradients, weights, optimizer, bandwidth } in &self.rows {
            let bandwidth = bandwidth.map_or("-".to_owned(), |bytes| format!("{:.3} GB/s", bytes / 1e9));
            let numbers = [world_size.to_string(), zero_stage.to_string()];
            rows.add_row(
                numbers.into_iter().chain([gradients, weights, optimizer].map(|b| mebibytes(*b))).chain([bandwidth]),
            );
        }
        writeln!(f, "{}", right(rows))?;
        if self.gradient_per_layer > 0 {
            writeln!(f, "gradients of a layer's adapters: {}", mebibytes(self.gradient_per_layer))?;
        }
        write!(f, "below that bandwidth of each process a step waits longer for the network than it computes")
    }
}
