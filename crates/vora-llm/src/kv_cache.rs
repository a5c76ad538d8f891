//! Keys and values already computed, for generating one token at a time.

use std::ops::Range;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_lora::Active;
use vora_torch::nn::attention::{Band, Bands, Run, has_attention};
use vora_torch::nn::decode::LoraId;

use crate::config::LlmConfig;
use crate::error::CacheError;

/// Keys and values of every layer that makes its own, for a batch of sequences, in memory taken once.
///
/// Rows may differ in length: a row's tokens lie at the front, and a step writes after them.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    lens: Vec<i64>,        // tokens of each row
    adapters: Vec<LoraId>, // those that act on what is added to each row
    capacity: i64,
    kind: Kind,
    device: Device,
}

/// One layer's part.
#[derive(Debug)]
pub(crate) struct LayerCache {
    keys: Tensor,   // [batch, kv_heads, capacity, head_dim], rotated
    values: Tensor, // [batch, kv_heads, capacity, head_dim]
}

/// What the layers share in one decoding step.
#[derive(Debug)]
pub(crate) struct Step {
    /// `[batch, 1]`
    pub(crate) position_ids: Tensor,
    /// The first key that any row attends to: 0, or where the shortest row's window begins.
    first: i64,
    /// One more than the last key that any row attends to, which is the new one of the longest.
    seen: i64,
    pub(crate) kernel: StepKernel,
    lens: Vec<i64>, // tokens of each row, the new one not counted
    kind: Kind,
    /// Row and slot of each new key, where rows differ in length.
    places: Option<[Tensor; 2]>,
    /// The rows that adapters act on.
    pub(crate) adapters: Active,
}

/// What serves a step's attention.
#[derive(Debug)]
pub(crate) enum StepKernel {
    /// A call over all keys.
    Plain,
    /// A call with an additive mask `[batch, 1, 1, seen - first]`, where rows differ in length.
    Mask(Tensor),
    /// A call that is told the keys of each row, counted from `first`.
    Bands(Bands),
}

impl KvCache {
    /// Room for `capacity` tokens in each of `batch` rows; `kind` is the model's dtype.
    ///
    /// # Errors
    /// Where there is no room to take: batch or capacity below 1.
    pub fn new(config: &LlmConfig, batch: i64, capacity: i64, device: Device, kind: Kind) -> Result<Self> {
        ensure!(batch > 0, "a cache for {batch} sequences");
        ensure!(capacity > 0, "a cache for {capacity} tokens");
        // Zeros, since a masked value still meets its weight of zero in a product, and 0 * NaN is NaN.
        let zeros = |(heads, head_dim)| Tensor::zeros([batch, heads, capacity, head_dim], (kind, device));
        let layer = |size| LayerCache { keys: zeros(size), values: zeros(size) };
        let layers = config.cached_heads().map(layer).collect();
        let rows = batch as usize;
        Ok(Self { layers, lens: vec![0; rows], adapters: vec![LoraId::OWN; rows], capacity, kind, device })
    }

    /// Tokens held of each row.
    pub fn lens(&self) -> &[i64] {
        &self.lens
    }

    /// Tokens that a row can hold.
    pub fn capacity(&self) -> i64 {
        self.capacity
    }

    /// Rows.
    pub fn batch(&self) -> i64 {
        self.lens.len() as i64
    }

    /// Bytes that keys and values take.
    pub fn num_bytes(&self) -> usize {
        self.layers.iter().map(|l| (l.keys.numel() + l.values.numel()) * self.kind.elt_size_in_bytes()).sum()
    }

    /// Keeps at most the first `len` tokens of every row.
    pub fn truncate(&mut self, len: i64) {
        self.lens.iter_mut().for_each(|l| *l = (*l).min(len.max(0)));
    }

    /// Forgets everything; the memory stays.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Checks that rows of these lengths fit before anything is computed.
    pub(crate) fn check_prefill(&self, row_lens: &[i64]) -> Result<()> {
        if self.lens.iter().any(|&len| len > 0) {
            return Err(CacheError::Filled.into());
        }
        self.check_rows(row_lens.len() as i64)?;
        ensure!(row_lens.iter().all(|&len| len > 0), "a row without tokens has nothing to go on from");
        let seq = row_lens.iter().copied().max().unwrap_or(0);
        if seq > self.capacity {
            return Err(CacheError::TooLong { seq, capacity: self.capacity }.into());
        }
        Ok(())
    }

    fn check_rows(&self, found: i64) -> Result<(), CacheError> {
        let expected = self.batch();
        if found == expected { Ok(()) } else { Err(CacheError::Rows { found, expected }) }
    }

    pub(crate) fn filled(&mut self, row_lens: &[i64], adapters: &[LoraId]) {
        (self.lens, self.adapters) = (row_lens.to_vec(), adapters.to_vec());
    }

    /// Plans a step that adds one token to every row.
    pub(crate) fn next_step(&self, batch: i64) -> Result<Step, CacheError> {
        self.check_rows(batch)?;
        let longest = *self.lens.iter().max().expect("batch is at least 1");
        let shortest = *self.lens.iter().min().expect("batch is at least 1");
        if shortest == 0 {
            return Err(CacheError::Empty);
        }
        if longest >= self.capacity {
            return Err(CacheError::Full { len: longest, capacity: self.capacity });
        }
        Ok(Step::new(&self.lens, &self.adapters, self.device, self.kind))
    }

    pub(crate) fn stepped(&mut self) {
        self.lens.iter_mut().for_each(|len| *len += 1);
    }
}

impl Step {
    /// A step that adds one token to every row of these lengths.
    pub(crate) fn new(lens: &[i64], adapters: &[LoraId], device: Device, kind: Kind) -> Self {
        let (longest, shortest) = (lens.iter().max().copied().unwrap_or(0), lens.iter().min().copied().unwrap_or(0));
        let of_rows = Tensor::from_slice(lens).to_device(device); // [batch]
        let rows = || Tensor::arange(lens.len() as i64, (Kind::Int64, device));
        let places = (longest != shortest).then(|| [rows(), of_rows.shallow_clone()]);
        let adapters = Active::of_tokens(adapters, device);
        let (position_ids, lens, kernel) = (of_rows.unsqueeze(1), lens.to_vec(), StepKernel::Plain);
        Self { position_ids, first: 0, seen: longest + 1, kernel, lens, kind, places, adapters }.with_kernel(None)
    }

    /// The keys that some row attends to, counted from each row's first.
    pub(crate) fn seen(&self) -> Range<i64> {
        self.first..self.seen
    }

    /// The same step for layers with a sliding window; none where that hides no key.
    pub(crate) fn within(&self, window: i64) -> Option<Self> {
        if self.seen <= window {
            return None;
        }
        let shortest = self.lens.iter().min().expect("batch is at least 1");
        let step = Self {
            position_ids: self.position_ids.shallow_clone(),
            first: (shortest + 1 - window).max(0),
            kernel: StepKernel::Plain,
            lens: self.lens.clone(),
            places: self.places.as_ref().map(|places| places.each_ref().map(Tensor::shallow_clone)),
            adapters: self.adapters.clone(),
            ..*self
        };
        Some(step.with_kernel(Some(window)))
    }

    fn with_kernel(self, window: Option<i64>) -> Self {
        let kernel = if has_attention(self.position_ids.device(), self.kind) {
            StepKernel::Bands(self.bands(window))
        } else if self.places.is_some() {
            StepKernel::Mask(self.mask(window))
        } else {
            StepKernel::Plain
        };
        Self { kernel, ..self }
    }

    fn bands(&self, window: Option<i64>) -> Bands {
        let row = |&len: &i64| {
            let first = window.map_or(0, |window| (len + 1 - window).max(0));
            vec![Run { queries: 0..1, bands: vec![Band::all(first - self.first..len + 1 - self.first)] }]
        };
        Bands::new(&self.lens.iter().map(row).collect::<Vec<_>>()).expect("one query a row")
    }

    /// `[batch, 1, 1, seen - first]`, additive
    fn mask(&self, window: Option<i64>) -> Tensor {
        let (batch, device) = (self.position_ids.size()[0], self.position_ids.device());
        let keys = Tensor::arange_start(self.first, self.seen, (Kind::Int64, device)).unsqueeze(0);
        let mut unseen = keys.gt_tensor(&self.position_ids); // [batch, seen - first]
        if let Some(window) = window {
            unseen = unseen.logical_or(&keys.le_tensor(&(&self.position_ids - window)));
        }
        let keys = self.seen - self.first;
        Tensor::zeros([batch, keys], (self.kind, device))
            .masked_fill(&unseen, f64::NEG_INFINITY)
            .view([batch, 1, 1, keys])
    }
}

impl LayerCache {
    /// Keeps `[batch, kv_heads, seq, head_dim]` as the first tokens.
    pub(crate) fn fill(&mut self, k: &Tensor, v: &Tensor) {
        let seq = k.size()[2];
        self.keys.narrow(2, 0, seq).copy_(k);
        self.values.narrow(2, 0, seq).copy_(v);
    }

    /// The first `seq` tokens' keys and values, `[batch, kv_heads, seq, head_dim]` each.
    pub(crate) fn first(&self, seq: i64) -> [Tensor; 2] {
        [&self.keys, &self.values].map(|kept| kept.narrow(2, 0, seq))
    }

    /// Adds `[batch, kv_heads, 1, head_dim]` after each row's tokens.
    pub(crate) fn append(&mut self, k: &Tensor, v: &Tensor, step: &Step) {
        for (kept, new) in [(&self.keys, k), (&self.values, v)] {
            match &step.places {
                None => kept.narrow(2, step.seen - 1, 1).copy_(new),
                Some([rows, slots]) => {
                    let places = [Some(rows), None, Some(slots)]; // [batch, kv_heads, head_dim]
                    let _ = kept.shallow_clone().index_put_(&places, &new.squeeze_dim(2), false);
                }
            }
        }
    }

    /// All keys and values that the step's tokens attend to, `[batch, kv_heads, seen - first, head_dim]` each.
    pub(crate) fn seen(&self, step: &Step) -> [Tensor; 2] {
        [&self.keys, &self.values].map(|kept| kept.narrow(2, step.first, step.seen - step.first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: (Device, Kind) = (Device::Cpu, Kind::Float);

    #[test]
    fn rows_of_different_length_are_written_after_their_end() {
        let mut cache = KvCache::new(&LlmConfig::tiny(8), 2, 5, F32.0, F32.1).unwrap();
        assert_eq!(cache.num_bytes(), 2 * 2 * (2 * 2 * 5 * 8) * 4);
        cache.check_prefill(&[1, 3]).unwrap();
        let ones = Tensor::ones([2, 2, 3, 8], (F32.1, F32.0));
        cache.layers[0].fill(&ones, &ones);
        cache.filled(&[1, 3], &[LoraId::OWN; 2]);
        let step = cache.next_step(2).unwrap();
        let new = Tensor::full([2, 2, 1, 8], 7.0, (F32.1, F32.0));
        cache.layers[0].append(&new, &new, &step);
        let [keys, values] = cache.layers[0].seen(&step);
        cache.stepped();
        assert_eq!(cache.lens(), [2, 4]);
        for kept in [keys, values] {
            let kept: Vec<f32> = kept.select(3, 0).select(1, 1).flatten(0, -1).try_into().unwrap();
            assert_eq!(kept, [1.0, 7.0, 1.0, 0.0, 1.0, 1.0, 1.0, 7.0]);
        }
        let unseen = f32::NEG_INFINITY;
        assert_eq!(masks(&step, None), [[0.0, 0.0, unseen, unseen, 0.0, 0.0, 0.0, 0.0]; 2]);
        cache.truncate(3);
        assert_eq!(cache.lens(), [2, 3]);
    }

    #[test]
    fn a_window_narrows_what_a_step_sees() {
        let mut cache = KvCache::new(&LlmConfig::tiny(8), 2, 9, F32.0, F32.1).unwrap();
        cache.filled(&[3, 5], &[LoraId::OWN; 2]);
        let step = cache.next_step(2).unwrap();
        assert!(step.within(6).is_none());
        let windowed = step.within(2).unwrap();
        assert_eq!((windowed.first, windowed.seen), (2, 6));
        let unseen = f32::NEG_INFINITY;
        assert_eq!(masks(&windowed, Some(2)), [[0.0, 0.0, unseen, unseen, unseen, unseen, 0.0, 0.0]; 2]);
        let new = Tensor::full([2, 2, 1, 8], 7.0, (F32.1, F32.0));
        cache.layers[0].append(&new, &new, &windowed);
        let [keys, _] = cache.layers[0].seen(&windowed);
        let kept: Vec<f32> = keys.select(3, 0).select(1, 1).flatten(0, -1).try_into().unwrap();
        assert_eq!(kept, [0.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0]);
        // Rows of one length attend to all that is handed over, and need no mask where there are no bands.
        let mut cache = KvCache::new(&LlmConfig::tiny(8), 2, 9, Device::Cpu, Kind::Double).unwrap();
        cache.filled(&[4, 4], &[LoraId::OWN; 2]);
        let windowed = cache.next_step(2).unwrap().within(2).unwrap();
        assert!((windowed.first, windowed.seen) == (3, 5) && matches!(windowed.kernel, StepKernel::Plain));
        cache.filled(&[4, 2], &[LoraId::OWN; 2]);
        assert!(matches!(cache.next_step(2).unwrap().kernel, StepKernel::Mask(_)));
    }

    /// What a step with bands attends to, by those and by a mask.
    fn masks(step: &Step, window: Option<i64>) -> [Vec<f32>; 2] {
        let StepKernel::Bands(bands) = &step.kernel else { panic!("{:?}", step.kernel) };
        let of_bands = bands.mask(1, step.seen - step.first, F32.0, F32.1);
        [of_bands, step.mask(window)].map(|mask| mask.flatten(0, -1).try_into().unwrap())
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let config = LlmConfig::tiny(8);
        assert!(KvCache::new(&config, 0, 4, F32.0, F32.1).unwrap_err().to_string().contains("0 sequences"));
        assert!(KvCache::new(&config, 1, 0, F32.0, F32.1).unwrap_err().to_string().contains("0 tokens"));
        let mut cache = KvCache::new(&config, 1, 4, F32.0, F32.1).unwrap();
        assert_eq!(cache.next_step(1).unwrap_err(), CacheError::Empty);
        let refused = |cache: &KvCache, row_lens: &[i64]| {
            *cache.check_prefill(row_lens).unwrap_err().downcast_ref::<CacheError>().unwrap()
        };
        assert_eq!(refused(&cache, &[5]), CacheError::TooLong { seq: 5, capacity: 4 });
        assert_eq!(refused(&cache, &[1, 1]), CacheError::Rows { found: 2, expected: 1 });
        assert_eq!(refused(&cache, &[1, 1]).to_string(), "2 rows in a cache for 1");
        cache.filled(&[4], &[LoraId::OWN]);
        assert_eq!(cache.next_step(1).unwrap_err(), CacheError::Full { len: 4, capacity: 4 });
        assert_eq!(refused(&cache, &[1]), CacheError::Filled);
        cache.reset();
        cache.check_prefill(&[1]).unwrap();
    }
}
