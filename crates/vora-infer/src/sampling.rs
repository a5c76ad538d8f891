//! From logits to the next token: bias and penalties, temperature, top-k, top-p, min-p, in the order of HF's generate.

use std::collections::HashMap;

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
    /// Keeps tokens at least this share as likely as the likeliest (arXiv 2407.01082); 0 keeps all.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens already seen (Keskar et al. 2019); 1 changes nothing.
    pub repetition_penalty: f64,
    /// Taken from the logit of each token that was already generated, the prompt not counted, as OpenAI and vLLM do.
    pub presence_penalty: f64,
    /// Taken from a token's logit as often as it was already generated.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens before anything else.
    pub logit_bias: Vec<(i64, f32)>,
    /// Of the random numbers; the same seed gives the same tokens.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
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

    /// The same with this [`min_p`](Self::min_p).
    #[must_use]
    pub fn with_min_p(self, min_p: f64) -> Self {
        Self { min_p, ..self }
    }

    /// The same with this [`presence_penalty`](Self::presence_penalty).
    #[must_use]
    pub fn with_presence_penalty(self, presence_penalty: f64) -> Self {
        Self { presence_penalty, ..self }
    }

    /// The same with this [`frequency_penalty`](Self::frequency_penalty).
    #[must_use]
    pub fn with_frequency_penalty(self, frequency_penalty: f64) -> Self {
        Self { frequency_penalty, ..self }
    }

    /// The same with this [`logit_bias`](Self::logit_bias).
    #[must_use]
    pub fn with_logit_bias(self, logit_bias: Vec<(i64, f32)>) -> Self {
        Self { logit_bias, ..self }
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
        let Self { temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, .. } = *self;
        ensure!(
            temperature.is_finite() && temperature >= 0.0,
            "temperature is {temperature}, it must be 0 (greedy) or more"
        );
        ensure!(top_p > 0.0 && top_p <= 1.0, "top_p is {top_p}, it must lie in (0, 1]");
        ensure!(
            repetition_penalty.is_finite() && repetition_penalty > 0.0,
            "repetition_penalty is {repetition_penalty}, it must be more than 0"
        );
        ensure!((0.0..=1.0).contains(&min_p), "min_p is {min_p}, it must lie in [0, 1]");
        for (name, value) in [("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)] {
            ensure!(value.is_finite(), "{name} is {value}, it must be a number");
        }
        for &(token, bias) in &self.logit_bias {
            ensure!(token >= 0 && !bias.is_nan(), "logit_bias of token {token} is {bias}");
        }
        Ok(())
    }
}

/// Chooses the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    seen: HashMap<i64, u32>, // how often each token was generated; 0 for those of the prompt alone
}

impl Sampler {
    /// A sampler for a sequence that starts with `prompt`, whose tokens count as seen.
    ///
    /// # Errors
    /// As [`SamplingParams::validate`].
    pub fn new(params: SamplingParams, prompt: &[i64]) -> Result<Self> {
        params.validate()?;
        let rng = ChaCha8Rng::seed_from_u64(params.seed);
        Ok(Self { params, rng, seen: prompt.iter().map(|&token| (token, 0)).collect() })
    }

    /// The next token for `logits` `[vocab]` of any dtype and device.
    ///
    /// # Errors
    /// Where the logits are no vector.
    pub fn next_token(&mut self, logits: &Tensor) -> Result<i64> {
        Ok(self.choose(&mut Vec::<f32>::try_from(logits.to_kind(Kind::Float).contiguous().view([-1]))?))
    }

    /// The next token for the logits of all tokens, which biases and penalties change in place. One of minus infinity is
    /// chosen only where all are.
    pub fn choose(&mut self, logits: &mut [f32]) -> i64 {
        self.penalize(logits);
        let token = if self.params.temperature == 0.0 { most_likely(logits) } else { self.draw(logits) as i64 };
        self.saw(token);
        token
    }

    /// Counts a token as generated that was not chosen here.
    pub(crate) fn saw(&mut self, token: i64) {
        *self.seen.entry(token).or_default() += 1;
    }

    /// vLLM's order: biases, HF's RepetitionPenaltyLogitsProcessor, OpenAI's two penalties.
    fn penalize(&self, logits: &mut [f32]) {
        let at = |token: i64| usize::try_from(token).unwrap_or(usize::MAX);
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.params;
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(at(token)) {
                *logit += bias;
            }
        }
        if (repetition_penalty, presence_penalty, frequency_penalty) == (1.0, 0.0, 0.0) {
            return;
        }
        for (&token, &times) in &self.seen {
            let Some(logit) = logits.get_mut(at(token)) else { continue };
            let repeated = repetition_penalty as f32;
            *logit = if *logit < 0.0 { *logit * repeated } else { *logit / repeated };
            if times > 0 {
                *logit -= (presence_penalty + f64::from(times) * frequency_penalty) as f32;
            }
        }
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

fn most_likely(logits: &[f32]) -> i64 {
    let best = logits.iter().enumerate().fold(0, |best, (i, &l)| if l > logits[best] { i } else { best });
    best as i64
}

/// The tokens that temperature, top-k, top-p and min-p leave with their probabilities, the most likely first; none with a logit
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
    let least = kept[0].1 * params.min_p;
    kept.retain(|&(_, probability)| probability >= least);
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
        let twice = SamplingParams { repetition_penalty: 2.0, ..params(0.0) };
        Sampler::new(twice, &[0, 1, 0, 99]).unwrap().penalize(&mut logits);
        assert_eq!(logits, [1.0, -4.0, 2.0]);
        let mut sampler = Sampler::new(SamplingParams { repetition_penalty: 3.0, ..params(0.0) }, &[1]).unwrap();
        let logits = Tensor::from_slice(&[1f32, 2.0, 0.5]);
        let tokens: Vec<i64> = (0..2).map(|_| sampler.next_token(&logits).unwrap()).collect();
        assert_eq!(tokens, [0, 1], "1 was in the prompt; after 0 both are seen");
    }

    #[test]
    fn presence_and_frequency_count_what_was_generated() {
        let penalties = params(0.0).with_presence_penalty(0.5).with_frequency_penalty(0.25);
        let mut sampler = Sampler::new(penalties.with_logit_bias(vec![(2, -1.0), (99, 5.0)]), &[0]).unwrap();
        (0..2).for_each(|_| sampler.saw(1));
        let mut logits = [1.0f32, 1.0, 1.0];
        sampler.penalize(&mut logits);
        assert_eq!(logits, [1.0, 0.0, 0.0], "the prompt's token 0 is not generated, 1 was twice, 2 is biased");
    }

    #[test]
    fn min_p_keeps_what_comes_near_the_likeliest() {
        let logits = [0.0f32, 2f32.ln(), 5f32.ln()];
        let kept = |min_p| keep(&logits, &params(1.0).with_min_p(min_p)).len();
        assert_eq!((kept(0.0), kept(0.3), kept(0.5), kept(1.0)), (3, 2, 1, 1));
    }

    #[test]
    fn ranges_are_checked() {
        for (wrong, name) in [
            (params(-1.0), "temperature"),
            (params(f64::NAN), "temperature"),
            (SamplingParams { top_p: 0.0, ..params(1.0) }, "top_p"),
            (SamplingParams { repetition_penalty: 0.0, ..params(1.0) }, "repetition_penalty"),
            (params(1.0).with_min_p(1.5), "min_p"),
            (params(1.0).with_presence_penalty(f64::INFINITY), "presence_penalty"),
            (params(1.0).with_logit_bias(vec![(-1, 1.0)]), "logit_bias of token -1"),
        ] {
            let error = Sampler::new(wrong, &[]).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }
}
