//! Adapters that act on some of a batch alone, against PEFT's mixed batches and a hook on its adapters.

use fixtures::{Golden, assert_close_to};
use tch::{Device, Kind, Tensor};
use vora_lora::{ActsOn, LoraConfig, attach_all};
use vora_text::{Span, Spans};
use vora_torch::weights::Weights;

use super::CausalLm;
use crate::{AttentionPlan, DropoutSeed, LlmConfig, VisionAttention};

fn base(golden: &Golden) -> CausalLm {
    let config = LlmConfig { intermediate_size: 48, ..LlmConfig::tiny(64) };
    let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, Kind::Float);
    let llm = CausalLm::load(&config, &weights).unwrap();
    weights.finish().unwrap();
    llm
}

fn adapted(golden: &Golden) -> (CausalLm, Weights) {
    let mut llm = base(golden);
    let adapter = Weights::from_tensors(golden.under("adapter."), Device::Cpu, Kind::Float);
    let lora = LoraConfig { lora_alpha: Some(4.5), ..LoraConfig::new(3, 1) };
    attach_all("a", &lora, &adapter, |visit| llm.linears_mut(visit)).unwrap();
    adapter.finish().unwrap();
    (llm, adapter)
}

/// Pictures among words in rows 0 and 2, words alone in row 1; the reference knows no pictures, so that attention is
/// causal.
fn plan() -> AttentionPlan {
    let rows = vec![
        vec![Span::text(1), Span::image(1, 3), Span::text(3)],
        vec![Span::text(7)],
        vec![Span::text(2), Span::image(2, 2), Span::text(1)],
    ];
    AttentionPlan::new(&Spans::new(rows), VisionAttention::Causal, Device::Cpu, Kind::Float).unwrap()
}

fn logits(llm: &CausalLm, input_ids: &Tensor, plan: &AttentionPlan) -> Tensor {
    llm.logits(&llm.decoder().forward(&llm.embed(input_ids), plan, 0).last_hidden_state)
}

#[test]
fn rows_and_tokens_match_reference() {
    let golden = fixtures::open("acts_on");
    let (llm, input_ids) = (adapted(&golden).0, &golden["input_ids"]);
    for (plan, expected) in [
        (plan(), "all"),
        (plan().with_adapters(ActsOn::All), "all"),
        (plan().without_adapters(), "none"),
        (plan().with_adapters(ActsOn::WithImage), "rows"),
        (plan().with_adapters(ActsOn::ImageTokens), "tokens"),
    ] {
        assert_close_to(&logits(&llm, input_ids, &plan), &golden[expected], 2e-5);
    }
}

#[test]
fn gradients_through_some_tokens_match_reference() {
    let golden = fixtures::open("acts_on");
    let (llm, adapter) = adapted(&golden);
    let plan = plan().with_adapters(ActsOn::ImageTokens);
    let embeds = llm.embed(&golden["input_ids"]);
    let (kept, seed) = (llm.decoder().forward_train(&embeds, &plan, 0, DropoutSeed::new(0)), DropoutSeed::new(0));
    kept.backward(|output| Ok(llm.logits(&output.last_hidden_state).square().sum(Kind::Float))).unwrap();
    let compare = || {
        for (name, tensor) in adapter.parameters() {
            let expected = &golden[&format!("grad.{name}")];
            let scale = expected.abs().max().double_value(&[]);
            assert_close_to(&(tensor.grad() / scale), &(expected / scale), 1e-5);
            tensor.shallow_clone().zero_grad();
        }
    };
    compare();
    let anew = llm.decoder().forward_recomputed(&embeds, &plan, 0, seed);
    anew.backward(|output| Ok(llm.logits(&output.last_hidden_state).square().sum(Kind::Float))).unwrap();
    compare();
}

/// A row without a picture gets what a model gets to which no adapter was ever attached, in the same batch, bit for
/// bit; so does its continuation from a cache. Continuations of the others are PEFT's.
#[test]
fn a_row_without_a_picture_meets_the_base() {
    let golden = fixtures::open("acts_on");
    let (adapted, base) = (adapted(&golden).0, base(&golden));
    let (input_ids, step_ids) = (&golden["input_ids"], &golden["step_ids"]);
    let with_image = plan().with_adapters(ActsOn::WithImage);
    let of = |llm: &CausalLm, plan: &AttentionPlan| logits(llm, input_ids, plan).get(1);
    assert!(of(&adapted, &with_image).equal(&of(&base, &plan())));
    assert!(logits(&adapted, input_ids, &plan().without_adapters()).equal(&logits(&base, input_ids, &plan())));

    let go_on = |llm: &CausalLm, plan: &AttentionPlan| {
        let mut cache = llm.new_cache(3, 9).unwrap();
        let mut found = vec![llm.prefill(&llm.embed(input_ids), plan, &mut cache).unwrap()];
        for step in 0..2 {
            found.push(llm.decode_step(&step_ids.narrow(1, step, 1), &mut cache).unwrap());
        }
        found
    };
    let (seeing, plain) = (go_on(&adapted, &with_image), go_on(&base, &plan()));
    assert_close_to(&seeing[0], &golden["rows"].select(1, 6), 2e-5);
    for (step, (seeing, plain)) in seeing.iter().zip(&plain).enumerate() {
        assert!(seeing.get(1).equal(&plain.get(1)));
        assert!(!seeing.get(0).allclose(&plain.get(0), 1e-3, 1e-3, false));
        if step > 0 {
            assert_close_to(seeing, &golden["steps"].get(step as i64 - 1), 2e-5);
        }
    }
}

#[test]
fn what_follows_picture_tokens_is_written_without_adapters() {
    let golden = fixtures::open("acts_on");
    let (llm, input_ids) = (adapted(&golden).0, &golden["input_ids"]);
    let mut cache = llm.new_cache(3, 8).unwrap();
    let plan = plan().with_adapters(ActsOn::ImageTokens);
    let _ = llm.prefill(&llm.embed(input_ids), &plan, &mut cache).unwrap();
    let found = llm.decode_step(&golden["step_ids"].narrow(1, 0, 1), &mut cache).unwrap();
    // The same by one forward over the longer rows.
    let rows = [vec![Span::text(1), Span::image(1, 3), Span::text(4)], vec![Span::text(8)]];
    let third = vec![Span::text(2), Span::image(2, 2), Span::text(2)];
    let spans = Spans::new([rows.to_vec(), vec![third]].concat());
    let longer = AttentionPlan::new(&spans, VisionAttention::Causal, Device::Cpu, Kind::Float).unwrap();
    let ids = Tensor::cat(&[input_ids.shallow_clone(), golden["step_ids"].narrow(1, 0, 1)], 1);
    let expected = logits(&llm, &ids, &longer.with_adapters(ActsOn::ImageTokens)).select(1, 7);
    assert_close_to(&found, &expected, 2e-5);
}
