//! Perplexity of a language model on a text, by sliding windows.

use anyhow::{Result, bail, ensure};
use serde::Serialize;
use tch::Tensor;
use vora_llm::{AttentionPlan, CausalLm, VisionAttention};
use vora_lora::ActsOn;
use vora_text::Spans;
use vora_torch::nn::loss::cross_entropy;

/// Rows of logits that are made at once.
const LOGIT_ROWS: i64 = 512;

/// How well a text was foretold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Perplexity {
    /// `exp(loss)`
    pub perplexity: f64,
    /// Mean of `-log p` over the tokens, in nats.
    pub loss: f64,
    /// How many tokens were foretold: all but the first.
    pub tokens: u64,
}

/// `exp(mean(-log p(token | what stands before it in its window)))` over the tokens of a text.
///
/// Windows of at most `max_length` tokens begin every `stride` tokens; each scores those that none before it has, as in
/// Hugging Face's page on perplexity, which takes the ids of
/// [`Tokenizer::encode_whole`](vora_text::Tokenizer::encode_whole). That page weighs every window by one token less than
/// it scores; here each token counts once. The LLM's adapters, where it has some apart from its weights, act on the
/// tokens of `acts_on`: a text has no picture.
///
/// # Errors
/// Where there are less than two tokens, the window is longer than the model's context, or windows would leave gaps.
pub fn perplexity(
    llm: &CausalLm,
    acts_on: ActsOn,
    input_ids: &[i64],
    max_length: usize,
    stride: usize,
) -> Result<Perplexity> {
    let context = llm.config().max_position_embeddings;
    ensure!(input_ids.len() > 1, "the text has {} tokens, it takes two or more", input_ids.len());
    ensure!(max_length > 1, "a window of {max_length} tokens foretells nothing, it takes two or more");
    ensure!(max_length as i64 <= context, "a window has {max_length} tokens, the model's context is {context}");
    let rows = llm.config().vocab_size;
    if let Some(id) = input_ids.iter().find(|id| !(0..rows).contains(id)) {
        bail!(
            "the text has a token of id {id}, but the model's embedding has {rows} rows: take the tokenizer that belongs \
             to the model, or resize its embedding"
        );
    }
    ensure!(stride > 0 && stride <= max_length, "stride is {stride}, it must lie in 1..={max_length}, the window");
    let (mut sum, mut tokens, mut scored) = (0.0, 0, 1); // the first token is foretold by nothing
    for begin in (0..input_ids.len()).step_by(stride) {
        let end = input_ids.len().min(begin + max_length);
        // With windows that do not overlap, the first token of each has nothing before it.
        let first = scored.max(begin + 1);
        if first < end {
            sum += window_loss(llm, acts_on, &input_ids[begin..end], first - begin)?;
            tokens += (end - first) as u64;
        }
        scored = end;
        if end == input_ids.len() {
            break;
        }
    }
    let loss = sum / tokens as f64;
    Ok(Perplexity { perplexity: loss.exp(), loss, tokens })
}

/// The summed loss of the tokens of a window from `first` on.
fn window_loss(llm: &CausalLm, acts_on: ActsOn, input_ids: &[i64], first: usize) -> Result<f64> {
    let seq = input_ids.len() as i64;
    let plan = AttentionPlan::new(&Spans::text(&[seq]), VisionAttention::Causal, llm.device(), llm.kind())?;
    let plan = plan.with_adapters(acts_on);
    let ids = Tensor::from_slice(input_ids).to_device(llm.device());
    let first = first as i64;
    let loss = tch::no_grad(|| {
        let output = llm.decoder().forward(&llm.embed(&ids.unsqueeze(0)), &plan, 0);
        let hidden = output.last_hidden_state.squeeze_dim(0).narrow(0, first - 1, seq - first); // [n, hidden]
        cross_entropy(&hidden, &ids.narrow(0, first, seq - first), LOGIT_ROWS, |hidden| llm.logits(hidden))
    });
    Ok(loss.double_value(&[]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};
    use vora_llm::LlmConfig;
    use vora_text::Tokenizer;
    use vora_torch::weights::Weights;

    fn llm() -> CausalLm {
        let folder = fixtures::root().join("tiny/llm");
        let weights = Weights::open(&folder, Device::Cpu, Kind::Float).unwrap();
        CausalLm::load(&LlmConfig::open(&folder).unwrap(), &weights).unwrap()
    }

    #[test]
    fn matches_reference() {
        let golden = std::fs::read(fixtures::root().join("golden/perplexity.json")).unwrap();
        let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
        let ids: Vec<i64> = serde_json::from_value(golden["ids"].clone()).unwrap();
        let tokenizer = Tokenizer::open(&fixtures::root().join("tiny/llm")).unwrap();
        assert_eq!(tokenizer.encode(golden["text"].as_str().unwrap()).unwrap(), ids);
        let llm = llm();
        for case in golden["cases"].as_array().unwrap() {
            let size = |name: &str| case[name].as_u64().unwrap();
            let found =
                perplexity(&llm, ActsOn::All, &ids, size("max_length") as usize, size("stride") as usize).unwrap();
            assert_eq!(found.tokens, size("tokens"), "{case}");
            for (name, tolerance) in [("perplexity", 1e-5), ("page", 1e-3)] {
                let ratio = found.perplexity / case[name].as_f64().unwrap();
                assert!((ratio - 1.0).abs() < tolerance, "{name}: {found:?}, expected {case}");
            }
        }
    }

    #[test]
    fn windows_that_make_no_sense_are_refused() {
        let llm = llm();
        let context = llm.config().max_position_embeddings as usize;
        let error = |ids: &[i64], max, stride| perplexity(&llm, ActsOn::All, ids, max, stride).unwrap_err().to_string();
        assert!(error(&[1], 8, 8).contains("1 tokens, it takes two"));
        assert!(error(&[1, 2], context + 1, 8).contains("the model's context is"));
        assert!(error(&[1, 2], 8, 9).contains("stride is 9, it must lie in 1..=8"));
        assert!(error(&[1, 2], 8, 0).contains("stride is 0"));
        assert!(error(&[1, 512], 8, 8).contains("a token of id 512, but the model's embedding has 512 rows"));
    }
}
