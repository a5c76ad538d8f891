//! Every architecture against HF's, from the `config.json` that HF writes.

use std::collections::BTreeMap;

use fixtures::{Golden, assert_close_to};
use tch::nn::Module;
use tch::{Device, Kind, Tensor};
use vora_lora::LoraConfig;
use vora_text::{Span, Spans};
use vora_torch::checkpoint::save;
use vora_torch::nn::decode::LoraId;
use vora_torch::weights::Weights;

use super::{CausalLm, DropoutSeed};
use crate::{AttentionPlan, KvPages, LlmConfig, PagedRow, SharedKeys, VisionAttention};

/// One case of a golden file.
pub(super) struct Case {
    pub(super) name: String,
    pub(super) config: LlmConfig,
    pub(super) golden: Golden,
    weights: Vec<String>, // prefixes of its weights in the golden file, a later one's instead of an earlier one's
}

/// The cases of `golden/<file>.json`, and whether each has weights of its own.
fn cases_of(file: &str, own_weights: bool) -> Vec<Case> {
    let path = fixtures::root().join("golden").join(format!("{file}.json"));
    let configs: BTreeMap<String, LlmConfig> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let case = |(name, config)| {
        let own = own_weights.then(|| format!("{name}.weights."));
        let weights = ["weights.".to_owned()].into_iter().chain(own).collect();
        Case { name, config, golden: fixtures::open(file), weights }
    };
    configs.into_iter().map(case).collect()
}

fn chameleons() -> Vec<Case> {
    cases_of("chameleon_llm", false)
}

pub(super) fn gemmas() -> Vec<Case> {
    cases_of("gemma", true)
}

/// Those that the packed decoder serves.
pub(super) fn packed_cases() -> Vec<Case> {
    cases_of("decoders", true).into_iter().chain(chameleons()).collect()
}

fn cases() -> Vec<Case> {
    let cases: Vec<Case> = packed_cases().into_iter().chain(gemmas()).collect();
    assert_eq!(cases.len(), 14);
    cases
}

impl Case {
    pub(super) fn get(&self, name: &str) -> &Tensor {
        &self.golden[&format!("{}.{name}", self.name)]
    }

    /// The tensors of its checkpoint.
    fn checkpoint(&self) -> BTreeMap<String, Tensor> {
        let mut tensors: BTreeMap<String, Tensor> =
            self.weights.iter().flat_map(|prefix| self.golden.under(prefix)).collect();
        if self.config.tie_word_embeddings {
            tensors.remove("lm_head.weight");
        }
        tensors.retain(|name, _| !name.starts_with("model.vqmodel."));
        tensors
    }

    pub(super) fn load(&self, kind: Kind) -> CausalLm {
        let weights = Weights::from_tensors(self.checkpoint(), Device::Cpu, kind);
        let llm = CausalLm::load(&self.config, &weights).unwrap();
        weights.finish().unwrap();
        llm
    }

    /// Logits of the golden tokens, `[batch, seq, vocab]`
    fn logits(&self, llm: &CausalLm) -> Tensor {
        let plan = text(&[10, 10], llm.kind());
        llm.logits(&llm.decoder().forward(&llm.embed(&self.golden["input_ids"]), &plan, 0).last_hidden_state)
    }
}

fn text(lens: &[i64], kind: Kind) -> AttentionPlan {
    AttentionPlan::new(&Spans::text(lens), VisionAttention::Bidirectional, Device::Cpu, kind).unwrap()
}

fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    (found.to_kind(Kind::Float) - expected.to_kind(Kind::Float)).abs().max().double_value(&[])
}

#[test]
fn hidden_states_logits_and_gradients_match_reference() {
    for case in cases() {
        let llm = case.load(Kind::Float);
        let inputs_embeds = llm.embed(&case.golden["input_ids"]).set_requires_grad(true);
        let layers = case.config.num_hidden_layers;
        let output = llm.decoder().forward(&inputs_embeds, &text(&[10, 10], Kind::Float), layers);
        assert_eq!(output.hidden_states.len(), layers + 1);
        for (i, hidden) in output.hidden_states.iter().enumerate() {
            assert_close_to(hidden, case.get(&format!("hidden_states.{i}")), 2e-5);
        }
        // The layers one by one, each from what goes into it.
        let plan = text(&[10, 10], Kind::Float);
        let (shared, mut keys) = (llm.model.shared(&plan), SharedKeys::default());
        for (i, layer) in llm.model.layers.iter().enumerate() {
            let y = layer.forward(&output.hidden_states[i], &shared.cos_sin, shared.by(layer), &mut keys);
            let y = if i + 1 == layers { llm.model.norm.forward(&y) } else { y };
            assert_close_to(&y, &output.hidden_states[i + 1], 1e-6);
        }
        let logits = llm.logits(&output.last_hidden_state);
        assert_close_to(&logits, case.get("logits"), 2e-5);
        logits.square().mean(Kind::Float).backward();
        assert_close_to(&inputs_embeds.grad(), case.get("grad_inputs_embeds"), 2e-5);
    }
}

/// Rows of different length in one batch, and each by itself.
#[test]
fn decoding_step_by_step_matches_reference() {
    for case in cases() {
        let llm = case.load(Kind::Float);
        let (prompts, continuation) = (&case.golden["prompts"], &case.golden["continuation"]);
        for rows in [0..2, 0..1, 1..2] {
            let lens = &[5, 8][rows.clone()];
            let batch = lens.len() as i64;
            let of_rows = |t: &Tensor| t.narrow(0, rows.start as i64, batch);
            let mut cache = llm.new_cache(batch, 12).unwrap();
            let prompts = of_rows(prompts).narrow(1, 0, *lens.iter().max().unwrap());
            let mut logits = vec![llm.prefill(&llm.embed(&prompts), &text(lens, Kind::Float), &mut cache).unwrap()];
            for step in 0..4 {
                let input_ids = of_rows(continuation).narrow(1, step, 1);
                logits.push(llm.decode_step(&input_ids, &mut cache).unwrap());
            }
            assert_close_to(&Tensor::stack(&logits, 1), &of_rows(case.get("steps")), 2e-5);
        }
    }
}

/// A prompt into pages in two parts, and on from there, where layers differ in what they keep.
#[test]
fn keys_of_gemma_in_pages_match_reference() {
    for case in gemmas() {
        let llm = case.load(Kind::Float);
        let prompt = llm.embed(&case.golden["prompts"].narrow(0, 1, 1)); // [1, 8, hidden]
        let mut cache = KvPages::new(&case.config, 6, 3, Device::Cpu, Kind::Float).unwrap();
        let bytes = KvPages::page_bytes(&case.config, 3, Kind::Float);
        assert_eq!(bytes * 6, llm.new_cache(6, 3).unwrap().num_bytes(), "{}", case.name);
        let row = |len| PagedRow { pages: &[5, 0, 3, 1], len, adapter: LoraId::OWN };
        let plan = text(&[8], Kind::Float);
        let mut logits = Vec::new();
        for part in [0..5, 5..8] {
            let embeds = prompt.narrow(1, part.start, part.end - part.start);
            logits = vec![
                llm.prefill_pages(&embeds, &plan.part(part.clone()).unwrap(), &row(part.start), &mut cache).unwrap(),
            ];
        }
        for step in 0..4 {
            let id = case.golden["continuation"].int64_value(&[1, step]);
            logits.push(llm.decode_pages(&[id], &[row(8 + step)], &mut cache).unwrap());
        }
        assert_close_to(&Tensor::stack(&logits, 1), &case.get("steps").narrow(0, 1, 1), 2e-5);
    }
}

/// HF's logits in bf16 are so far from its logits in f32: ours must not be much further.
#[test]
fn bf16_is_as_close_as_the_references() {
    for case in cases() {
        let theirs = case.get("bf16_difference").double_value(&[]);
        assert_close_to(&case.logits(&case.load(Kind::BFloat16)), case.get("logits"), 1.5 * theirs);
    }
}

#[test]
fn saving_and_loading_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for case in cases() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let llm = case.load(kind);
            let tensors = llm.tensors();
            let names: Vec<&String> = tensors.iter().map(|(name, _)| name).collect();
            let mut sorted = names.clone();
            sorted.sort();
            assert_eq!(sorted, case.checkpoint().keys().collect::<Vec<_>>(), "{}", case.name);
            let path = folder.path().join("model.safetensors");
            save(&path, &tensors, &[]).unwrap();
            let json = serde_json::to_string(&case.config).unwrap();
            let config: LlmConfig = serde_json::from_str(&json).unwrap();
            assert_eq!(config, case.config);
            let weights = Weights::open(&path, Device::Cpu, kind).unwrap();
            let again = CausalLm::load(&config, &weights).unwrap();
            weights.finish().unwrap();
            for ((name, found), (_, expected)) in again.tensors().iter().zip(&tensors) {
                assert!(found.kind() == kind && found.equal(expected), "{}: {name}", case.name);
            }
            assert!(case.logits(&again).equal(&case.logits(&llm)), "{}", case.name);
        }
    }
}

/// Adapters on every linear layer change the logits, and merged ones do the same.
#[test]
fn adapters_attach_and_merge() {
    for case in cases() {
        let mut llm = case.load(Kind::Float);
        let before = case.logits(&llm);
        let new = Weights::random(9, Device::Cpu, Kind::Float);
        let lora = LoraConfig::new(2, case.config.num_hidden_layers as i64);
        let mut count = 0;
        let random = fixtures::Random::new(9);
        llm.linears_mut(&mut |path, linear| {
            count += 1;
            linear.attach("sight", &lora, &new.pp(path))?;
            for adapter in linear.adapters() {
                let b = adapter.lora_b().shallow_clone();
                tch::no_grad(|| b.shallow_clone().copy_(&(random.normal(b.size()) * 0.1)));
            }
            Ok(())
        })
        .unwrap();
        let matrices = case.checkpoint().into_iter().filter(|(name, _)| name.contains("_proj.weight")).count();
        assert_eq!(count, matrices);
        let attached = case.logits(&llm);
        assert!(difference(&attached, &before) > 0.1, "{}", case.name);
        llm.linears_mut(&mut |_, linear| {
            linear.merge();
            Ok(())
        })
        .unwrap();
        assert_close_to(&case.logits(&llm), &attached, 3e-5);
    }
}

/// The window of each row's tokens, an image among them: what the whole sequence gives, the cache gives.
#[test]
fn windows_and_images_with_and_without_cache() {
    let random = fixtures::Random::new(4);
    for case in cases().iter().filter(|case| case.config.sliding_window.is_some()) {
        let llm = case.load(Kind::Float);
        for mode in [VisionAttention::Bidirectional, VisionAttention::Causal] {
            let plan = |rows| AttentionPlan::new(&Spans::new(rows), mode, Device::Cpu, Kind::Float).unwrap();
            let row = |new: i64| vec![Span::text(1), Span::image(2, 3), Span::text(2 + new)];
            let embeds = random.normal([1, 9, 32]);
            let mut cache = llm.new_cache(1, 20).unwrap();
            let mut logits = llm.prefill(&embeds, &plan(vec![row(0)]), &mut cache).unwrap();
            let mut whole = embeds;
            for new in 0..6 {
                let output = llm.decoder().forward(&whole, &plan(vec![row(new)]), 0);
                let without = llm.logits(&output.last_hidden_state.select(1, -1));
                assert_close_to(&logits, &without, 2e-5);
                let token = without.argmax(-1, true); // [1, 1]
                whole = Tensor::cat(&[&whole, &llm.embed(&token)], 1);
                logits = llm.decode_step(&token, &mut cache).unwrap();
            }
        }
    }
}

#[test]
fn a_published_chameleon_has_its_image_tokenizer_beside() {
    for case in chameleons() {
        let weights = Weights::from_tensors(case.golden.under("weights."), Device::Cpu, Kind::Float);
        CausalLm::load(&case.config, &weights).unwrap();
        let error = weights.finish().unwrap_err().to_string();
        assert!(error.ends_with("\n  unexpected model.vqmodel.quantize.embedding.weight"), "{error}");
        weights.finish_allowing(|name| name.starts_with("model.vqmodel.")).unwrap();
        assert_eq!(case.config.extra["vocabulary_map"]["<image>"], 8);
        assert_eq!(case.config.extra["vq_config"]["num_embeddings"], 6);
    }
}

#[test]
fn dropout_acts_in_training_alone_and_by_its_seed() {
    let _generator = super::dropout::GENERATOR.lock().unwrap();
    for case in chameleons() {
        for (attention_dropout, dropout) in [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)] {
            let config =
                LlmConfig { attention_dropout: Some(attention_dropout), dropout: Some(dropout), ..case.config.clone() };
            let weights = Weights::from_tensors(case.checkpoint(), Device::Cpu, Kind::Float);
            let llm = CausalLm::load(&config, &weights).unwrap();
            assert_close_to(&case.logits(&llm), case.get("logits"), 2e-5);
            let (embeds, plan) = (llm.embed(&case.golden["input_ids"]), text(&[10, 10], Kind::Float));
            let train = |seed| llm.decoder().forward_train(&embeds, &plan, 1, DropoutSeed::new(seed)).output;
            let (first, again, other) = (train(1), train(1), train(2));
            assert!(first.last_hidden_state.equal(&again.last_hidden_state));
            let drops = attention_dropout + dropout > 0.0;
            for unlike in [&other, &llm.decoder().forward(&embeds, &plan, 1)] {
                assert_eq!(first.last_hidden_state.equal(&unlike.last_hidden_state), !drops, "{}", case.name);
            }
            if dropout > 0.0 && !config.has_swin_norm() {
                // What attention and MLP added was dropped or doubled, at one in four places both: nothing was added.
                let kept = first.hidden_states[1].eq_tensor(&embeds).to_kind(Kind::Float).mean(Kind::Float);
                assert!((kept.double_value(&[]) - 0.25).abs() < 0.06, "{kept:?}");
            }
        }
    }
}

#[test]
fn a_gguf_file_alone_is_a_decoder() {
    let golden_logits = fixtures::open("gguf_logits");
    for architecture in ["llama", "qwen2", "qwen3"] {
        let path = fixtures::root().join(format!("golden/gguf_{architecture}.gguf"));
        let weights = Weights::open(&path, Device::Cpu, Kind::Float).unwrap();
        let llm = CausalLm::load(&LlmConfig::open(&path).unwrap(), &weights).unwrap();
        weights.finish().unwrap();
        let plan = AttentionPlan::new(&Spans::text(&[24]), VisionAttention::Causal, Device::Cpu, Kind::Float);
        let output = llm.decoder().forward(&llm.embed(&golden_logits["input_ids"]), &plan.unwrap(), 0);
        let expected = &golden_logits[&format!("{architecture}.logits")];
        fixtures::assert_close_to(&llm.logits(&output.last_hidden_state), expected, 2e-5);
    }
}
