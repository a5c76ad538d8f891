//! LoRA on a model of one's own: two linears get adapters, learn, and are saved for PEFT and merged.
//!
//! ```sh
//! cargo run -p vora-examples --bin attach_lora [FOLDER]
//! ```

use std::path::PathBuf;

use anyhow::Result;
use vora_lora::optim::{Optimizer, OptimizerConfig};
use vora_lora::tch::{Device, Kind, Tensor, nn::Module};
use vora_lora::{BaseModel, Linear, LoraConfig, Weights, attach_all, save_adapter};

/// The model: an MLP.
struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    fn forward(&self, x: &Tensor) -> Tensor {
        self.fc2.forward(&self.fc1.forward(x).relu())
    }
}

fn main() -> Result<()> {
    let folder = std::env::args().nth(1).map_or_else(|| std::env::temp_dir().join("vora-adapter"), PathBuf::from);
    let base = Weights::random(42, Device::Cpu, Kind::Float); // or Weights::open(a folder of safetensors, ..)
    let mut model =
        Mlp { fc1: Linear::load(&base.pp("fc1"), 16, 64, true)?, fc2: Linear::load(&base.pp("fc2"), 64, 16, true)? };

    // Adapters of rank 4 on both. B is zero at the start: nothing changes yet.
    let config = LoraConfig::of_modules(4, ["fc1", "fc2"]);
    let adapters = Weights::random(7, Device::Cpu, Kind::Float);
    attach_all("mine", &config, &adapters, |visit| {
        visit("fc1", &mut model.fc1)?;
        visit("fc2", &mut model.fc2)
    })?;

    // Only the adapters learn: to give back what they are given.
    let mut optimizer = Optimizer::adamw(adapters.parameters(), 1e-2, OptimizerConfig::default())?;
    let x = Tensor::linspace(-1, 1, 8 * 16, (Kind::Float, Device::Cpu)).view([8, 16]);
    for step in 1..=100 {
        optimizer.zero_grad()?;
        let loss = (model.forward(&x) - &x).square().mean(Kind::Float);
        loss.backward();
        let norm = optimizer.grad_norm()?.double_value(&[]);
        optimizer.step(1.0, norm)?; // 1.0: the schedule's factor
        if step == 1 || step % 25 == 0 {
            println!("step {step}  loss {:.4}", loss.double_value(&[]));
        }
    }

    save_adapter(&folder, &config, BaseModel::new("me/my-model"), &adapters.parameters())?;
    let adapted = model.forward(&x);
    model.fc1.merge();
    model.fc2.merge();
    let change = (model.forward(&x) - adapted).abs().max().double_value(&[]);
    println!("merged, which changes no output by more than {change:.0e}; the adapter lies in {}", folder.display());
    Ok(())
}
