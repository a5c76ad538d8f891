//! From logits to the next token: repetition penalty, temperature, top-k, top-p, in the order of HF's generate.

use anyhow::{Result, ensure};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

/// How tokens are chosen. The default is greedy.
///
/// ```
/// use vora_infer::SamplingParams;
///
/// let params = SamplingParams::default().with_temperature(0.7).with_top_p(0.9).with_seed(1);
/// assert_eq!((params.temperature, params.top_k, params.top_p), (0.7, 0, 0.9));
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token and needs no random numbers.
    pub temperature: f64,
    /// Keeps the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f64,
    /// Divides positive and multiplies negative logits of tokens already seen (Keskar et al. 2019); 1 changes nothing.
    pub repetition_penalty: f64,
    /// Of the random numbers; the same seed gives the same tokens.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplingParams {
    /// The same with this [`temperature`](Self::temperature).
    #[must_use]
    pub fn with_temperature(self, temperature: f64) -> Self {
        Self { temperature, ..self }
    }

    /// The same with this [`top_k`](Self::top_k).
    #[must_use]
    pub fn with_top_k(self, top_k: usize) -> Self {
        Self { top_k, ..self }
    }

    /// The same with this [`top_p`](Self::top_p).
    #[must_use]
    pub fn with_top_p(self, top_p: f64) -> Self {
        Self { top_p, ..self }
    }

    /// The same with this [`repetition_penalty`](Self::repetition_penalty).
    #[must_use]
    pub fn with_repetition_penalty(self, repetition_penalty: f64) -> Self {
        Self { repetition_penalty, ..self }
    }

    /// The same with this [`seed`](Self::seed).
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Checks every field's range.
    ///
    /// # Errors
    /// Names the first field out of its range, and its value.
    pub fn validate(&self) -> Result<()> {
        let Self { temperature, top_p, repetition_penalty, .. } = *self;
        ensure!(
            temperature.is_finite() && temperature >= 0.0,
            "temperature is {temperature}, it must be 0 (greedy) or more"
        );
        ensure!(top_p > 0.0 && top_p <= 1.0, "top_p is {top_p}, it must lie in (0, 1]");
        ensure!(
            repetition_penalty.is_finite() && repetition_penalty > 0.0,
            "repetition_penalty is {repetition_penalty}, it must be more than 0"
        );
        Ok(())
    }
}

/// Chooses the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    seen: Vec<i64>,
}

impl Sampler {
    /// A sampler for a sequence that starts with `prompt`, whose tokens count as seen.
    ///
    /// # Errors
    /// As [`SamplingParams::validate`].
    pub fn new(params: SamplingParams, prompt: &[i64]) -> Result<Self> {
        params.validate()?;
        let rng = ChaCha8Rng::seed_from_u64(params.seed);
        Ok(Self { params, rng, seen: prompt.to_vec() })
    }

    /// The next token for `logits` `[vocab]` of any dtype and device.
    ///
    /// # Errors
    /// Where the logits are no vector.
    pub fn next_token(&mut self, logits: &Tensor) -> Result<i64> {
        let greedy = self.params.temperature == 0.0;
        let token = if greedy && self.params.repetition_penalty == 1.0 {
            logits.argmax(-1, false).int64_value(&[])
        } else {
            let mut logits = Vec::<f32>::try_from(logits.to_kind(Kind::Float).contiguous().view([-1]))?;
            penalize(&mut logits, &self.seen, self.params.repetition_penalty);
            if greedy { most_likely(&logits) } else { self.draw(&logits) as i64 }
        };
        self.saw(token);
        Ok(token)
    }

    /// Counts a token as seen that was not chosen here.
    pub(crate) fn saw(&mut self, token: i64) {
        self.seen.push(token);
    }

    /// One draw from what temperature, top-k and top-p leave.
    fn draw(&mut self, logits: &[f32]) -> usize {
        let kept = keep(logits, &self.params);
        let mut at = self.rng.random::<f64>() * kept.iter().map(|&(_, p)| p).sum::<f64>();
        for &(token, probability) in &kept {
            at -= probability;
            if at < 0.0 {
                return token;
            }
        }
        kept.last().map_or(0, |&(token, _)| token)
    }
}

/// HF's RepetitionPenaltyLogitsProcessor.
fn penalize(logits: &mut [f32], seen: &[i64], penalty: f64) {
    if penalty == 1.0 {
        return;
    }
    let mut seen: Vec<usize> = seen.iter().filter_map(|&t| usize::try_from(t).ok()).collect();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(logit) = logits.get_mut(token) {
            *logit = if *logit < 0.0 { *logit * penalty as f32 } else { *logit / penalty as f32 };
        }
    }
}

fn most_likely(logits: &[f32]) -> i64 {
    let best = logits.iter().enumerate().fold(0, |best, (i, &l)| if l > logits[best] { i } else { best });
    best as i64
}

/// The tokens that temperature, top-k and top-p leave with their probabilities, the most likely first; none with a logit
/// of minus infinity.
fn keep(logits: &[f32], params: &SamplingParams) -> Vec<(usize, f64)> {
    let mut order: Vec<usize> = (0..logits.len()).filter(|&token| logits[token] != f32::NEG_INFINITY).collect();
    let by_logit = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let k = if params.top_k == 0 { order.len() } else { params.top_k.min(order.len()) };
    if k < order.len() {
        order.select_nth_unstable_by(k, by_logit);
        order.truncate(k);
    }
    order.sort_unstable_by(by_logit);
    let Some(&first) = order.first() else { return Vec::new() };
    let highest = f64::from(logits[first]);
    let mut kept: Vec<(usize, f64)> = order
        .into_iter()
        .map(|token| (token, ((f64::from(logits[token]) - highest) / params.temperature).exp()))
        .collect();
    let total: f64 = kept.iter().map(|&(_, p)| p).sum();
    let mut sum = 0.0;
    let mut len = 0;
    for (_, probability) in &mut kept {
        *probability /= total;
        // HF keeps a token while what lies before it sums to less than top_p.
        if len == 0 || sum < params.top_p {
            len += 1;
        }
        sum += *probability;
    }
    kept.truncate(len);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(temperature: f64) -> SamplingParams {
        SamplingParams { temperature, ..SamplingParams::default() }
    }

    #[test]
    fn greedy_takes_the_largest() {
        let mut sampler = Sampler::new(params(0.0), &[]).unwrap();
        assert_eq!(sampler.next_token(&Tensor::from_slice(&[0.5f32, 3.0, -1.0])).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0f32, 2f32.ln(), 5f32.ln()]; // probabilities 1/8, 2/8, 5/8
        let mut sampler = Sampler::new(params(1.0), &[]).unwrap();
        let mut counts = [0i32; 3];
        for _ in 0..8000 {
            counts[sampler.draw(&logits)] += 1;
        }
        for (count, expected) in counts.iter().zip([1000, 2000, 5000]) {
            assert!((*count - expected).abs() < 200, "{counts:?}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let logits = Tensor::from_slice(&[0f32; 50]);
        let draw = |seed| -> Vec<i64> {
            let mut sampler = Sampler::new(SamplingParams { seed, ..params(1.0) }, &[]).unwrap();
            (0..20).map(|_| sampler.next_token(&logits).unwrap()).collect()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [1.0f32, 4.0, 3.0, 2.0];
        let tokens = |top_k, top_p| -> Vec<usize> {
            keep(&logits, &SamplingParams { top_k, top_p, ..params(1.0) }).iter().map(|&(t, _)| t).collect()
        };
        assert_eq!(tokens(0, 1.0), [1, 2, 3, 0]);
        assert_eq!(tokens(2, 1.0), [1, 2]);
        // Probabilities 0.644, 0.237, 0.087, 0.032.
        assert_eq!(tokens(0, 0.6), [1]);
        assert_eq!(tokens(0, 0.7), [1, 2]);
        assert_eq!(tokens(0, 0.9), [1, 2, 3]);
    }

    #[test]
    fn what_is_left_out_is_never_kept() {
        let kept = keep(&[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY], &SamplingParams { top_k: 2, ..params(1.0) });
        assert_eq!(kept, [(1, 1.0)]);
    }

    #[test]
    fn the_penalty_pushes_seen_tokens_down() {
        let mut logits = [2.0f32, -2.0, 2.0];
        penalize(&mut logits, &[0, 1, 0, 99], 2.0);
        assert_eq!(logits, [1.0, -4.0, 2.0]);
        let mut sampler = Sampler::new(SamplingParams { repetition_penalty: 3.0, ..params(0.0) }, &[1]).unwrap();
        let logits = Tensor::from_slice(&[1f32, 2.0, 0.5]);
        let tokens: Vec<i64> = (0..2).map(|_| sampler.next_token(&logits).unwrap()).collect();
        assert_eq!(tokens, [0, 1], "1 was in the prompt; after 0 both are seen");
    }

    #[test]
    fn ranges_are_checked() {
        for (wrong, name) in [
            (params(-1.0), "temperature"),
            (params(f64::NAN), "temperature"),
            (SamplingParams { top_p: 0.0, ..params(1.0) }, "top_p"),
            (SamplingParams { repetition_penalty: 0.0, ..params(1.0) }, "repetition_penalty"),
        ] {
            let error = Sampler::new(wrong, &[]).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }
}
