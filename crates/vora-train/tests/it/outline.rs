//! Plans of models whose weights are on no disk yet, counted from the published configs.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};
use tch::{Device, Kind};
use vora_recipe::TrainConfig;
use vora_student::Student;
use vora_train::{Options, Plan};

/// Copies what a folder of the fixtures has beside its weights and its config.
fn folder(of: &str, at: &Path, config: &Value) {
    std::fs::create_dir_all(at).unwrap();
    for file in std::fs::read_dir(fixtures::root().join("tiny").join(of)).unwrap().map(|entry| entry.unwrap().path()) {
        if file.extension().is_some_and(|extension| extension != "safetensors") {
            std::fs::copy(&file, at.join(file.file_name().unwrap())).unwrap();
        }
    }
    std::fs::write(at.join("config.json"), config.to_string()).unwrap();
}

/// `vora-7b.yaml` on folders under `models` with the published configs of both of its models, on a few records.
fn recipe(models: &Path, more: &[&str]) -> Result<TrainConfig> {
    let qwen = json!({
        "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "hidden_act": "silu", "tie_word_embeddings": false,
        "use_sliding_window": false, "bos_token_id": 151_643, "eos_token_id": 151_645,
    });
    let aimv2 = json!({
        "model_type": "aimv2", "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 12, "num_channels": 3, "image_size": 448, "patch_size": 14, "rms_norm_eps": 1e-5,
        "qkv_bias": false, "use_bias": false,
    });
    folder("llm", &models.join("Qwen/Qwen2.5-7B-Instruct"), &qwen);
    folder("dinov2", &models.join("apple/aimv2-huge-patch14-448"), &aimv2);
    let data = fixtures::root().join("tiny/data");
    let fetch = |key: &str, value: PathBuf| format!("data.train.data_fetch.data_paths.0.{key}={}", value.display());
    let mut all = vec![
        fetch("anno_path", data.join("conversations.jsonl")),
        fetch("image_folder", data.join("images")),
        format!("output_dir={}", models.join("run").display()),
    ];
    all.extend(more.iter().map(|&entry| entry.to_owned()));
    TrainConfig::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/vora-7b.yaml"), &all)
}

/// Qwen2.5-7B has 7,615,616,512 parameters, the encoder of AIMv2-Huge at 448 pixels 682,031,616 by its layers.
#[test]
fn the_published_7b_is_counted_from_configs_alone() {
    let models = tempfile::tempdir().unwrap();
    let resolve = |name: &str| Ok(models.path().join(name));
    let plan = |more: &[&str]| {
        let config = recipe(models.path(), more).unwrap();
        Plan::measure(&config, Options::new(Device::Cpu, &resolve)).unwrap().with_processes(1024)
    };
    let plan = plan(&[]);
    let parameters = &plan.size.parameters;
    assert_eq!((parameters.frozen, parameters.teacher), (7_615_616_512, 682_031_616));
    let adapters = 24 * 1024 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18_944));
    assert_eq!(parameters.trained["adapters"], adapters);
    assert!(plan.measured.is_none() && plan.size.memory.program < 8 << 30);
    assert_eq!(plan.size.memory.masters, 4 * parameters.trained.values().sum::<u64>());

    // In bf16, which the recipe asks for, a block's linears are shared out; embedding, head, norms and biases are not.
    let block = 2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 3584 * 18_944;
    let blocks: Vec<(u64, u64)> = plan.size.blocks.iter().map(|blocks| (blocks.count, blocks.frozen)).collect();
    assert_eq!(blocks, [(24, 2 * block), (4, 2 * block)]);
    assert_eq!((plan.size.blocks[0].adapters, plan.size.blocks[1].adapters), (4 * adapters / 24, 0));
    let scale = plan.scale.as_ref().unwrap();
    let at = |n: u64, stage: u64| scale.rows.iter().find(|row| (row.world_size, row.zero_stage) == (n, stage)).unwrap();
    assert_eq!(at(8, 3).gathered, 4 * 2 * 28 * 2 * block * 7 / 8);
    assert_eq!(at(8, 1).memory - at(8, 3).memory, 28 * 2 * block * 7 / 8 - 2 * 2 * block);
    assert!(at(1024, 3).memory < at(8, 3).memory && at(8, 3).bandwidth > at(8, 1).bandwidth);
    // Six products for each frozen element and token, and more: by hand, to a tenth.
    let tokens = (plan.size.batch.rows * plan.size.batch.seq) as f64;
    let layers = 6.0 * 28.0 * block as f64 + 8.0 * adapters as f64;
    let share = plan.size.flops as f64 / (4.0 * tokens * layers);
    assert!((1.0..1.15).contains(&share), "{share}");
    assert_eq!(scale.tera_flops, Some(100.0));
    let text = plan.to_string();
    for words in ["0 to 23", "24 to 27", "frozen got", "nothing was measured: each device computes 100 TFLOP/s"] {
        assert!(text.contains(words), "{words} is missing in\n{text}");
    }
}

#[test]
fn to_train_it_weights_are_needed_and_few_bits_are_counted_from_them() {
    let models = tempfile::tempdir().unwrap();
    let resolve = |name: &str| Ok(models.path().join(name));
    let error = |more: &[&str], open: &dyn Fn(&TrainConfig) -> Result<Student>| {
        format!("{:#}", open(&recipe(models.path(), more).unwrap()).map(drop).unwrap_err())
    };
    let trained = |config: &TrainConfig| Student::new(config, Device::Cpu, Kind::BFloat16, &resolve);
    let counted = |config: &TrainConfig| Student::outline(config, Device::Cpu, Kind::BFloat16, &resolve);
    assert!(error(&[], &trained).contains("safetensors"));
    let few_bits = error(&["model.load_in_4bit=true"], &counted);
    assert!(few_bits.contains("few bits are counted from weights"), "{few_bits}");
    let student = counted(&recipe(models.path(), &[]).unwrap()).unwrap();
    assert!(student.is_outline() && student.parameters().iter().all(|(_, tensor)| tensor.requires_grad()));
    // A LLaVA is counted as well.
    let llava = "model={type: llava, llm: Qwen/Qwen2.5-7B-Instruct, image_size: 448, \
                 vision_tower: apple/aimv2-huge-patch14-448, lora: {layers: 24, r: 64}}";
    let llava = counted(&recipe(models.path(), &[llava]).unwrap()).unwrap();
    assert!(llava.is_outline() && llava.distill.is_none());
}
