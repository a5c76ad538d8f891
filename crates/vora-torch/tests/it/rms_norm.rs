//! RMSNorm beside HF's.

use tch::nn::Module;
use tch::{Device, Kind, Tensor};
use vora_torch::nn::RmsNorm;
use vora_torch::weights::Weights;

#[test]
fn rows_come_out_with_the_weight_as_their_rms() {
    let weights = Weights::from_tensors(
        [("weight".to_owned(), Tensor::from_slice(&[1f32, 2.0, -0.5, 4.0]))],
        Device::Cpu,
        Kind::Float,
    );
    let norm = RmsNorm::load_trained(&weights, 4, 0.0).unwrap();
    let y = norm.forward(&Tensor::from_slice(&[3f32, -3.0, 3.0, 3.0]).view([1, 4]));
    fixtures::assert_close(&y, &Tensor::from_slice(&[1f32, -2.0, -0.5, 4.0]).view([1, 4]));
    y.sum(Kind::Float).backward();
    assert_eq!(weights.parameters()[0].1.grad().size(), [4]);
    let half = RmsNorm::load(&weights, 4, 1e-5).unwrap().forward(&Tensor::ones([2, 4], (Kind::BFloat16, Device::Cpu)));
    assert_eq!(half.kind(), Kind::BFloat16);
}

#[test]
fn a_weight_may_count_from_one_or_be_left_out() {
    let weights = || Weights::from_tensors([], Device::Cpu, Kind::Float);
    let x = fixtures::Random::new(3).normal([2, 4]);
    let plain = RmsNorm::unscaled(&weights(), 4, 1e-6).forward(&x);
    let of_one = Tensor::from_slice(&[0f32, 1.0, -0.5, -1.0]);
    let stored = Weights::from_tensors([("weight".to_owned(), of_one.copy())], Device::Cpu, Kind::Float);
    let norm = RmsNorm::load_plus_one(&stored, 4, 1e-6).unwrap();
    stored.finish().unwrap();
    fixtures::assert_close(&norm.forward(&x), &(&plain * (of_one + 1.0)));
    let new = RmsNorm::load_plus_one(&Weights::random(0, Device::Cpu, Kind::Float), 4, 1e-6).unwrap();
    fixtures::assert_close(&new.forward(&x), &plain);
}

#[test]
fn matches_reference() {
    let golden = fixtures::open("rms_norm");
    let weights = Weights::from_tensors([("weight".to_owned(), golden["weight"].copy())], Device::Cpu, Kind::Float);
    let norm = RmsNorm::load(&weights, 32, 1e-5).unwrap();
    for (suffix, kind) in [("", Kind::Float), ("_bf16", Kind::BFloat16)] {
        let x = golden["x"].detach().copy().to_kind(kind).set_requires_grad(true);
        let y = norm.forward(&x);
        assert_eq!(y.kind(), kind);
        (&y * golden["grad_y"].to_kind(kind)).sum(kind).backward();
        // In bf16 sums in another order may round to its neighbour.
        let tolerance = if kind == Kind::Float { 1e-5 } else { 2e-2 };
        fixtures::assert_close_to(&y, &golden[&format!("y{suffix}")], tolerance);
        fixtures::assert_close_to(&x.grad(), &golden[&format!("grad_x{suffix}")], tolerance);
    }
}
