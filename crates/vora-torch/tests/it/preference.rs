//! Log-probabilities and the loss of preferences beside TRL's.

use tch::{Kind, Tensor};
use vora_torch::nn::preference::{dpo, log_probabilities};

#[test]
fn loss_and_rewards_are_those_of_trl() {
    let golden = fixtures::open("dpo");
    for (name, beta) in [("tenth", 0.1), ("two", 2.0)] {
        let of = |key: &str| &golden[&format!("tensors.{name}.{key}")];
        let policy = golden["tensors.policy"].copy().set_requires_grad(true);
        let sums = |tokens: &Tensor| tokens.sum_dim_intlist(-1, false, Kind::Float).chunk(2, 0);
        let (policies, references) = (sums(&policy), sums(&golden["tensors.reference"]));
        let dpo = dpo(&policies[0], &policies[1], &references[0], &references[1], beta);
        let loss = dpo.losses.mean(Kind::Float);
        fixtures::assert_close_to(&loss, of("loss"), 1e-6);
        loss.backward();
        // TRL's log-probabilities outside an answer are 0 whatever the policy.
        fixtures::assert_close_to(
            &(policy.grad() * &golden["tensors.mask"]),
            &(of("grad") * &golden["tensors.mask"]),
            1e-6,
        );
        let (chosen, rejected) = (dpo.chosen_rewards, dpo.rejected_rewards);
        let accuracies = chosen.gt_tensor(&rejected).to_kind(Kind::Float);
        let rewards = [&chosen, &rejected, &accuracies, &(&chosen - &rejected)].map(|all| all.mean(Kind::Float));
        fixtures::assert_close_to(&Tensor::stack(&rewards, 0), of("rewards"), 1e-6);
    }
}

#[test]
fn a_pair_that_is_far_apart_has_a_finite_loss() {
    let far = Tensor::from_slice(&[-2e4f32, 0.0]).set_requires_grad(true);
    let zero = Tensor::from_slice(&[0f32, -2e4]);
    let losses = dpo(&far, &zero, &zero, &far.detach(), 0.1).losses;
    let found = Vec::<f32>::try_from(&losses).unwrap();
    assert!((found[0] - 4e3).abs() < 1.0 && found[1] == 0.0, "{found:?}");
    losses.sum(Kind::Float).backward();
    assert!(far.grad().isfinite().all().int64_value(&[]) == 1);
}

#[test]
fn chunks_change_nothing() {
    let golden = fixtures::open("losses");
    let (targets, head) = (&golden["ce.targets"], &golden["ce.lm_head"]);
    let weights = Tensor::arange(targets.size()[0], (Kind::Float, tch::Device::Cpu)) * 0.01;
    let run = |chunk| {
        let hidden = golden["ce.hidden"].copy().set_requires_grad(true);
        let found = log_probabilities(&(&hidden * 1.5), targets, chunk, |h| h.linear::<&Tensor>(head, None));
        (&found * &weights).sum(Kind::Float).square().backward();
        (found.detach(), hidden.grad())
    };
    let (whole, whole_grad) = run(1 << 10);
    for chunk in [1, 3, 4] {
        let (found, grad) = run(chunk);
        fixtures::assert_close_to(&found, &whole, 1e-5);
        fixtures::assert_close_to(&grad, &whole_grad, 1e-5);
    }
    let logits = |h: &Tensor| h.linear::<&Tensor>(head, None);
    let frozen = log_probabilities(&(&golden["ce.hidden"] * 1.5), targets, 2, logits);
    fixtures::assert_close_to(&frozen, &whole, 1e-5);
    // The mean cross-entropy is the mean of these.
    let mean = -log_probabilities(&golden["ce.hidden"], targets, 2, logits).mean(Kind::Float);
    fixtures::assert_close_to(&mean, &golden["ce.loss"], 1e-5);
}
