//! DPO over a batch of pairs: its reference is the same model with the adapters off.

use tch::{Kind, Tensor};
use vora_llm::{AttentionPlan, CausalLm};
use vora_torch::nn::preference::{Dpo, dpo, log_probabilities};

use crate::batch::DeviceBatch;
use crate::logits::logits_chunk;

/// What a batch's answers have by the reference.
#[derive(Debug)]
pub(crate) struct Reference {
    log_probabilities: Tensor, // [pairs, 2]
}

impl Reference {
    /// Runs the LLM with its adapters off; `plan` is the batch's.
    pub(crate) fn new(llm: &CausalLm, inputs_embeds: &Tensor, plan: AttentionPlan, batch: &DeviceBatch) -> Self {
        let plan = plan.without_adapters();
        let log_probabilities = tch::no_grad(|| {
            let output = llm.decoder().forward(inputs_embeds, &plan, 0);
            of_answers(llm, &output.last_hidden_state, batch)
        });
        Self { log_probabilities }
    }

    /// The loss of each pair, from the last hidden state `[batch, seq, hidden]` of the model with its adapters on.
    pub(crate) fn dpo(&self, llm: &CausalLm, hidden: &Tensor, batch: &DeviceBatch, beta: f64) -> Dpo {
        let policy = of_answers(llm, hidden, batch);
        let reference = &self.log_probabilities;
        dpo(&policy.select(1, 0), &policy.select(1, 1), &reference.select(1, 0), &reference.select(1, 1), beta)
    }
}

/// DPO's rewards of a batch, TRL's by these names: f32 scalars without a graph, summed over its pairs.
#[derive(Debug)]
#[non_exhaustive]
pub struct Rewards {
    /// `beta (log policy - log reference)` of the chosen answers.
    pub chosen: Tensor,
    /// The same of the rejected ones.
    pub rejected: Tensor,
    /// How many chosen answers have a higher reward than their rejected ones.
    pub accuracies: Tensor,
}

impl Rewards {
    pub(crate) fn of(pairs: &Dpo) -> Self {
        let (chosen, rejected) = (&pairs.chosen_rewards, &pairs.rejected_rewards);
        let accuracies = chosen.gt_tensor(rejected).to_kind(Kind::Float);
        let [chosen, rejected, accuracies] = [chosen, rejected, &accuracies].map(|all| all.sum(Kind::Float));
        Self { chosen, rejected, accuracies }
    }
}

/// The log-probability of every answer, the sum over its tokens: `[pairs, 2]`, chosen and rejected.
fn of_answers(llm: &CausalLm, hidden: &Tensor, batch: &DeviceBatch) -> Tensor {
    let hidden = hidden.flatten(0, 1).index_select(0, &batch.positions); // [n, hidden]
    let tokens = log_probabilities(&hidden, &batch.targets, logits_chunk(llm), |rows| llm.logits(rows)); // [n]
    let answers = tokens.split_with_sizes(batch.pairs.concat(), 0);
    let sums: Vec<Tensor> = answers.iter().map(|answer| answer.sum(Kind::Float)).collect();
    Tensor::stack(&sums, 0).view([-1, 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use fixtures::{Golden, assert_close_to};
    use tch::Device;
    use vora_data::{IGNORE_INDEX, QuestionSpan, Sample, collate_rows};
    use vora_llm::{LlmConfig, VisionAttention};
    use vora_lora::{ActsOn, LoraConfig, attach_all};
    use vora_text::Span;
    use vora_torch::weights::Weights;

    /// The decoder of the golden file with its adapter, whose parameters come with it.
    fn adapted(golden: &Golden) -> (CausalLm, Weights) {
        let config = LlmConfig { intermediate_size: 48, ..LlmConfig::tiny(512) };
        let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, Kind::Float);
        let mut llm = CausalLm::load(&config, &weights).unwrap();
        weights.finish().unwrap();
        let adapter = Weights::from_tensors(golden.under("adapter."), Device::Cpu, Kind::Float);
        let lora = LoraConfig { lora_alpha: Some(4.5), ..LoraConfig::new(3, 2) };
        attach_all("a", &lora, &adapter, |visit| llm.linears_mut(visit)).unwrap();
        adapter.finish().unwrap();
        (llm, adapter)
    }

    /// A pair as vora-data makes it: all of the prompt but its last token is the trunk.
    fn sample(prompt: &[i64], answers: [&[i64]; 2]) -> Sample {
        let (last, trunk) = prompt.split_last().unwrap();
        let mut sample = Sample {
            id: String::new(),
            input_ids: trunk.to_vec(),
            targets: vec![IGNORE_INDEX; trunk.len()],
            spans: vec![Span::text(trunk.len() as i64)],
            images: Vec::new(),
            questions: Vec::new(),
            cut_answers: 0,
            notes: Vec::new(),
        };
        for (branch, answer) in answers.into_iter().enumerate() {
            let start = sample.input_ids.len();
            sample.input_ids.push(*last);
            sample.input_ids.extend(&answer[..answer.len() - 1]);
            sample.targets.extend(answer);
            sample.spans.push(Span::text(answer.len() as i64).on_branch(branch as i64));
            sample.questions.push(QuestionSpan {
                kind: String::new(),
                question: String::new(),
                answer: String::new(),
                tokens: start..start + answer.len(),
                is_rejected: branch == 1,
            });
        }
        sample
    }

    /// TRL runs every answer as a row of its own after its prompt; here both are branches of one, alone in a row or packed
    /// with another pair.
    #[test]
    fn pairs_in_branches_are_trls_rows() {
        let golden = fixtures::open("dpo");
        let ids = |name: &str| Vec::<Vec<i64>>::try_from(&golden[name]).unwrap();
        let (prompts, chosen, rejected) = (ids("prompt"), ids("chosen"), ids("rejected"));
        let samples = || (0..2).map(|i| sample(&prompts[i], [&chosen[i], &rejected[i]]));
        for rows in [samples().map(|sample| vec![sample]).collect(), vec![samples().collect()]] {
            let (llm, adapter) = adapted(&golden);
            let batch = DeviceBatch::new(&collate_rows(rows, 0), Device::Cpu);
            assert_eq!(batch.pairs, [[4, 3]; 2]);
            let plan =
                || AttentionPlan::new(&batch.input.spans, VisionAttention::Causal, Device::Cpu, Kind::Float).unwrap();
            let inputs_embeds = llm.embed(&batch.input.input_ids);
            let reference = Reference::new(&llm, &inputs_embeds, plan(), &batch);
            let expected = |name: &str| golden[name].transpose(0, 1);
            assert_close_to(&reference.log_probabilities, &expected("ref_logps"), 2e-5);
            let plan = plan().with_adapters(ActsOn::All);
            let hidden = llm.decoder().forward(&inputs_embeds, &plan, 0).last_hidden_state;
            assert_close_to(&of_answers(&llm, &hidden, &batch), &expected("logps"), 2e-5);

            let pairs = reference.dpo(&llm, &hidden, &batch, 0.1);
            let loss = pairs.losses.mean(Kind::Float);
            assert_close_to(&loss, &golden["loss"], 1e-5);
            let Rewards { chosen, rejected, accuracies } = Rewards::of(&pairs);
            let margins = &chosen - &rejected;
            assert_close_to(
                &(Tensor::stack(&[chosen, rejected, accuracies, margins], 0) / 2.0),
                &golden["rewards"],
                1e-5,
            );
            loss.backward();
            let gradients = golden.under("grad.");
            assert_eq!(adapter.parameters().len(), gradients.len());
            for (name, parameter) in adapter.parameters() {
                let expected = &gradients.iter().find(|(other, _)| *other == name).unwrap().1;
                assert_close_to(&parameter.grad(), expected, 1e-5);
            }
        }
    }
}
