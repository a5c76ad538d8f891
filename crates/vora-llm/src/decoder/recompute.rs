//! Activation checkpointing: a forward that keeps what goes into each layer and nothing from inside it, and the
//! backward that computes each layer anew (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

use anyhow::Result;
use tch::Tensor;
use vora_torch::autograd;

use super::dropout::DropoutSeed;
use super::stack::{Decoder, Output, Shared};
use crate::attention::{AttentionPlan, SharedKeys};

/// What is left to do once a loss over a recomputed forward has gone backward: the layers, last to first.
///
/// Hidden states of that forward are leaves. A loss leaves its gradients in them, each layer adds to that of its input.
#[derive(Debug)]
pub(super) struct Recompute<'a> {
    decoder: &'a Decoder,
    inputs_embeds: Tensor,
    states: Vec<Tensor>, // what goes into each layer, and what leaves the last; [batch, seq, hidden]
    shared: Shared<'a, AttentionPlan>,
    seed: DropoutSeed,
}

/// As [`Decoder::forward_train`], with leaves for hidden states, and what goes backward from them.
pub(super) fn forward_recomputed<'a>(
    decoder: &'a Decoder,
    inputs_embeds: &Tensor,
    plan: &'a AttentionPlan,
    hidden_layers: usize,
    seed: DropoutSeed,
) -> (Output, Recompute<'a>) {
    let leaf = |x: &Tensor, requires_grad: bool| x.detach().set_requires_grad(requires_grad);
    // Without a trained embedding nothing is to be learned before the first layer.
    let first = leaf(inputs_embeds, inputs_embeds.requires_grad());
    let mut states = vec![first.shallow_clone()];
    let shared = decoder.shared(plan);
    let output = decoder.output(&first, hidden_layers, |layer_idx, layer, x| {
        let mut keys = SharedKeys::default(); // of no use to later layers, which have their own
        let seed = seed.at(layer_idx as u64);
        let forward = || layer.forward_train(x, &shared.cos_sin, shared.by(layer), &mut keys, seed);
        let y = leaf(&tch::no_grad(forward), true);
        states.push(y.shallow_clone());
        y
    });
    (output, Recompute { decoder, inputs_embeds: inputs_embeds.shallow_clone(), states, shared, seed })
}

impl Recompute<'_> {
    /// Takes the gradients that a loss left in the hidden states through every layer to the adapters, the weights that
    /// are trained, and the embeddings. What a layer makes on the way is gone before the next one begins.
    ///
    /// # Errors
    /// What libtorch says of it.
    pub(super) fn backward(self) -> Result<()> {
        let Self { decoder, inputs_embeds, mut states, shared, seed } = self;
        for (layer_idx, layer) in decoder.layers.iter().enumerate().rev() {
            // Whether or not a gradient comes that far: other processes may need them.
            let _gathered = decoder.gathered(layer);
            let (gradient, input) = (states.pop().map(|state| state.grad()), states.last());
            let (Some(gradient), Some(input)) = (gradient.filter(Tensor::defined), input) else { continue };
            let (mut keys, seed) = (SharedKeys::default(), seed.at(layer_idx as u64));
            let y = layer.forward_train(input, &shared.cos_sin, shared.by(layer), &mut keys, seed);
            if y.requires_grad() {
                autograd::backward(&y, &gradient)?;
            }
        }
        match states.pop().map(|state| state.grad()).filter(Tensor::defined) {
            Some(gradient) if inputs_embeds.requires_grad() => autograd::backward(&inputs_embeds, &gradient),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VisionAttention;
    use crate::decoder::architectures::{Case, gemmas};
    use crate::{CausalLm, KernelChoice, LlmConfig};
    use tch::{Device, Kind};
    use vora_lora::{LoraConfig, attach_all};
    use vora_text::{Span, Spans};
    use vora_torch::weights::{Init, Weights};

    const SEED: DropoutSeed = DropoutSeed::new(7);

    /// Values of a loss with a tap at every hidden state, and its gradients by name: by embeddings, adapters and,
    /// where they are trained, weights.
    fn gradients(config: &LlmConfig, kind: Kind, trained: bool, recomputed: bool) -> (f64, Vec<(String, Tensor)>) {
        let weights = Weights::random(3, Device::Cpu, kind).with_initializer_range(0.2);
        let source = if trained { weights.trained() } else { weights.clone() };
        let mut llm = CausalLm::load(config, &source).unwrap();
        let adapters = Weights::random(4, Device::Cpu, kind);
        if !trained {
            attach_all("a", &LoraConfig::new(2, 2), &adapters, |visit| llm.linears_mut(visit)).unwrap();
            for (name, b) in adapters.parameters().iter().filter(|(name, _)| name.contains("lora_B")) {
                let _ = tch::no_grad(|| b.shallow_clone().fill_(0.01 * (1 + name.len() % 7) as f64));
            }
        }
        let embeds = adapters.parameter("embeds", &[2, 9, config.hidden_size], Init::Normal { std: 1.0 }).unwrap();
        let spans = Spans::new(vec![vec![Span::text(2), Span::image(2, 2), Span::text(3)], vec![Span::text(9)]]);
        let choice = KernelChoice::Mask;
        let plan = AttentionPlan::with_kernel(&spans, VisionAttention::Bidirectional, Device::Cpu, kind, choice);
        let (layers, plan, inputs_embeds) = (config.num_hidden_layers, plan.unwrap(), embeds.to_kind(kind) * 1.5);
        let forward = if recomputed { Decoder::forward_recomputed } else { Decoder::forward_train };
        let pass = forward(llm.decoder(), &inputs_embeds, &plan, layers, SEED);
        let mut value = 0.0;
        let loss = |output: &Output| {
            assert_eq!(output.hidden_states.len(), layers + 1);
            let taps = output.hidden_states.iter().enumerate();
            let taps = taps.map(|(i, h)| h.to_kind(Kind::Float).sin().sum(Kind::Float) * (0.5 + i as f64));
            let logits = llm.logits(&output.last_hidden_state).to_kind(Kind::Float);
            let loss = taps.fold(logits.logsumexp([-1i64].as_slice(), false).sum(Kind::Float), |sum, tap| sum + tap);
            value = loss.double_value(&[]);
            Ok(loss)
        };
        pass.backward(loss).unwrap();
        let mut parameters = weights.parameters();
        parameters.extend(adapters.parameters());
        for (name, tensor) in llm.tensors().iter().filter(|_| !trained) {
            assert!(!tensor.grad().defined(), "{name} is frozen and has a gradient");
        }
        let of = |(name, tensor): (String, Tensor)| {
            assert!(tensor.grad().defined(), "no gradient reaches {name}");
            (name, tensor.grad())
        };
        (value, parameters.into_iter().map(of).collect())
    }

    #[test]
    fn gradients_are_those_of_a_forward_that_keeps_everything() {
        let tiny = LlmConfig::tiny(32);
        let _generator = crate::decoder::dropout::GENERATOR.lock().unwrap();
        let dropping = LlmConfig { attention_dropout: Some(0.3), dropout: Some(0.2), ..LlmConfig::tiny(32) };
        let windows = LlmConfig { model_type: "mistral".into(), sliding_window: Some(4), ..LlmConfig::tiny(32) };
        let tied = |case: Case| LlmConfig { tie_word_embeddings: true, ..case.config };
        let gemmas: Vec<LlmConfig> = gemmas().into_iter().map(tied).collect();
        let gemmas = gemmas.iter().flat_map(|config| [(config, false), (config, true)]);
        for (config, trained) in
            [(&tiny, false), (&windows, false), (&tiny, true), (&dropping, false)].into_iter().chain(gemmas)
        {
            let kept = gradients(config, Kind::Float, trained, false);
            let recomputed = gradients(config, Kind::Float, trained, true);
            assert_eq!(kept.0, recomputed.0);
            assert_eq!(kept.1.len(), recomputed.1.len());
            for ((name, kept), (_, recomputed)) in kept.1.iter().zip(&recomputed.1) {
                let scale = kept.abs().max().double_value(&[]);
                let difference = (kept - recomputed).abs().max().double_value(&[]);
                assert!(scale > 0.0 && difference <= 2e-6 * scale.max(1.0), "{name}: {difference} of {scale}");
            }
        }
    }

    #[test]
    fn in_bf16_gradients_differ_by_its_rounding() {
        let config = LlmConfig::tiny(32);
        let [exact, kept, recomputed] = [(Kind::Float, false), (Kind::BFloat16, false), (Kind::BFloat16, true)]
            .map(|(kind, recomputed)| gradients(&config, kind, false, recomputed));
        for ((name, exact), ((_, kept), (_, recomputed))) in exact.1.iter().zip(kept.1.iter().zip(&recomputed.1)) {
            let off = |found: &Tensor| (found - exact).norm().double_value(&[]);
            assert!(off(recomputed) <= 1.5 * off(kept) + 1e-3, "{name}: {} and {}", off(recomputed), off(kept));
        }
    }

    #[test]
    fn a_loss_that_reaches_few_layers_goes_back_through_those() {
        let llm = CausalLm::load(&LlmConfig::tiny(32), &Weights::random(1, Device::Cpu, Kind::Float)).unwrap();
        let embeds = llm.embed(&Tensor::from_slice(&[1i64, 2, 3]).unsqueeze(0)).set_requires_grad(true);
        let plan = AttentionPlan::new(&Spans::text(&[3]), VisionAttention::Causal, Device::Cpu, Kind::Float).unwrap();
        let pass = llm.decoder().forward_recomputed(&embeds, &plan, 1, SEED);
        pass.backward(|output| Ok(output.hidden_states[1].square().sum(Kind::Float))).unwrap();
        let found = embeds.grad().copy();
        let embeds = embeds.detach().set_requires_grad(true);
        llm.decoder().forward(&embeds, &plan, 1).hidden_states[1].square().sum(Kind::Float).backward();
        fixtures::assert_close_to(&found, &embeds.grad(), 1e-6);

        let frozen = embeds.detach();
        let pass = llm.decoder().forward_recomputed(&frozen, &plan, 0, SEED);
        pass.backward(|output| Ok(output.last_hidden_state.sum(Kind::Float))).unwrap();
        assert!(!frozen.grad().defined());
    }
}
