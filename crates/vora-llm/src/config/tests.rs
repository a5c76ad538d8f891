//! Configs as files have them: what loads, what is kept, what is refused and by which words.

use serde_json::Value;

use super::layers::SLIDING;
use super::*;
use crate::architecture::QkNorm;
use crate::error::ConfigError;
use crate::rope::RopeScaling;

const SMOLLM2: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": null,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16", "hidden_act": "silu", "eos_token_id": 2 }"#;

fn parse(text: &str) -> LlmConfig {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_gguf_file_alone_has_a_config() {
    let golden = |name: &str| fixtures::root().join("golden").join(name);
    let error = format!("{:#}", LlmConfig::open(&golden("gguf_kinds.gguf")).unwrap_err());
    assert!(error.contains("gguf_kinds.gguf: general.architecture is `test`, known are llama"), "{error}");
    let error = format!("{:#}", LlmConfig::open(&golden("none.gguf")).unwrap_err());
    assert!(error.contains("cannot read") && error.contains("none.gguf"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("gguf_qwen3.gguf"), folder.path().join("model.gguf")).unwrap();
    assert_eq!(LlmConfig::open(folder.path()).unwrap().model_type, "qwen3");
    // What lies beside it goes first.
    let json = serde_json::to_string(&LlmConfig::tiny(8)).unwrap();
    std::fs::write(folder.path().join("config.json"), json).unwrap();
    assert_eq!(LlmConfig::open(folder.path()).unwrap(), LlmConfig::tiny(8));
}

#[test]
fn published_keys_load_and_the_rest_is_kept() {
    let config = parse(SMOLLM2);
    config.validate().unwrap();
    assert_eq!((config.head_width(), config.kv_heads(), config.rotation(false).unwrap().theta), (64, 3, 100_000.0));
    assert_eq!(config.eos_token_ids(), [2]);
    assert_eq!(config.saved_dtype(), Some("bfloat16"));
    assert_eq!(config.rotation(false).unwrap().scaling, RopeScaling::Default);
    let written = serde_json::to_value(&config).unwrap();
    assert_eq!(written["architectures"][0], "LlamaForCausalLM");
    assert_eq!(parse(&written.to_string()), config);
    assert_eq!(parse(&SMOLLM2.replace("\"eos_token_id\": 2", "\"eos_token_id\": [2, 7]")).eos_token_ids(), [2, 7]);
}

#[test]
fn absent_keys_are_those_of_hfs_config_class() {
    let of = |model_type: &str| parse(&SMOLLM2.replace("\"llama\"", &format!("\"{model_type}\"")));
    assert_eq!(of("mistral").sliding_window, Some(4096));
    assert_eq!((of("qwen3").head_width(), of("llama").head_width()), (128, 64));
    let sparse = r#"{"model_type": "MODEL", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8,
        "num_hidden_layers": 4, "num_attention_heads": 32}"#;
    let sparse = |model_type: &str| parse(&sparse.replace("MODEL", model_type));
    assert_eq!((sparse("chameleon").rms_norm_eps, sparse("llama").rms_norm_eps), (1e-5, 1e-6));
    let smollm3 = sparse("smollm3");
    assert!(smollm3.tie_word_embeddings && !sparse("qwen2").tie_word_embeddings);
    assert_eq!(
        (smollm3.rotation(false).unwrap().theta, smollm3.max_position_embeddings, smollm3.kv_heads()),
        (2e6, 32_768, 4)
    );
    assert_eq!([0, 1, 2, 3].map(|layer_idx| smollm3.has_rope(layer_idx)), [true, true, true, false]);
    // A null is no absent key, and stays one in what is written.
    let written = serde_json::to_string(&LlmConfig { sliding_window: None, ..sparse("mistral") }).unwrap();
    assert_eq!(parse(&written).sliding_window, None);
}

#[test]
fn layers_have_the_windows_that_hf_gives_them() {
    let base = LlmConfig { num_hidden_layers: 3, sliding_window: Some(8), ..LlmConfig::tiny(64) };
    let types = |types: [&str; 3]| Some(types.map(str::to_owned).to_vec());
    let of = |model_type: &str| LlmConfig { model_type: model_type.into(), ..base.clone() };
    let on = |model_type: &str| LlmConfig { use_sliding_window: Some(true), ..of(model_type) };
    let (some, none) = (Some(8), None);
    for (config, windows) in [
        (of("mistral"), [some; 3]),
        (LlmConfig { sliding_window: None, ..of("mistral") }, [none; 3]),
        (of("qwen2"), [none; 3]),
        (on("qwen2"), [none; 3]), // max_window_layers is 28
        (LlmConfig { max_window_layers: Some(1), ..on("qwen2") }, [none, some, some]),
        (LlmConfig { layer_types: types([SLIDING, "full_attention", SLIDING]), ..on("qwen3") }, [some, none, some]),
        (LlmConfig { no_rope_layers: Some(vec![1, 0, 1]), ..on("smollm3") }, [none, some, none]),
        (LlmConfig { use_sliding_window: Some(false), ..of("llama") }, [none; 3]),
    ] {
        config.validate().unwrap();
        assert_eq!([0, 1, 2].map(|layer_idx| config.window(layer_idx)), windows, "{config:?}");
    }
    for (config, says) in [
        (LlmConfig { layer_types: types([SLIDING, "full_attention", SLIDING]), ..of("mistral") }, {
            "layer_types[1] is `full_attention`, but this layer of mistral has a window of 8"
        }),
        (LlmConfig { layer_types: types([SLIDING; 3]), ..of("qwen2") }, "layer_types[0] is `sliding_attention`"),
        (LlmConfig { layer_types: types(["chunked_attention"; 3]), ..on("qwen3") }, "known are full_attention"),
        (LlmConfig { layer_types: Some(vec![]), ..on("qwen3") }, "layer_types has 0 entries"),
        (LlmConfig { use_sliding_window: Some(false), ..of("mistral") }, "use_sliding_window is false"),
        (LlmConfig { sliding_window: Some(0), ..of("mistral") }, "sliding_window is 0"),
        (LlmConfig { model_type: "chameleon".into(), ..base.clone() }, "chameleon has no window"),
        (LlmConfig { no_rope_layers: Some(vec![1, 0, 1]), ..on("qwen3") }, "no_rope_layers has a 0, but qwen3"),
        (LlmConfig { no_rope_layers: Some(vec![1]), ..on("smollm3") }, "no_rope_layers has 1 entries"),
        (LlmConfig { no_rope_layer_interval: Some(0), ..on("smollm3") }, "no_rope_layer_interval is 0"),
    ] {
        let error = format!("{:#}", config.validate().unwrap_err());
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn both_spellings_of_rope_load() {
    let old = SMOLLM2.replace("null", r#"{"type": "linear", "rope_type": "linear", "factor": 4.0}"#);
    assert_eq!(parse(&old).rotation(false).unwrap().scaling, RopeScaling::Linear { factor: 4.0 });
    let new = SMOLLM2.replace(
        r#""rope_theta": 100000, "rope_scaling": null"#,
        r#""rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}"#,
    );
    assert_eq!(parse(&new).rotation(false).unwrap().theta, 5000.0);
    assert_eq!(parse(&new).rotation(false).unwrap().scaling, RopeScaling::Default);
}

#[test]
fn qwen2_has_biases_on_q_k_v() {
    let config = parse(&SMOLLM2.replace("\"model_type\": \"llama\"", "\"model_type\": \"qwen2\""));
    assert_eq!(config.attention_biases(), (true, false));
    assert_eq!(parse(SMOLLM2).attention_biases(), (false, false));
}

#[test]
fn chameleons_norm_of_q_and_k_may_be_left_out() {
    let chameleon = SMOLLM2.replace("\"llama\"", "\"chameleon\"");
    let without = parse(&chameleon.replace("\"chameleon\"", "\"chameleon\", \"qk_norm\": false"));
    without.validate().unwrap();
    assert_eq!((parse(&chameleon).head_norm(), without.head_norm()), (Some(QkNorm::Layer), None));
    let written = |config: &LlmConfig| serde_json::to_value(config).unwrap().get("qk_norm").cloned();
    assert_eq!((written(&parse(&chameleon)), written(&without)), (None, Some(Value::Bool(false))));
}

#[test]
fn what_is_not_supported_is_named() {
    for (from, to, says) in [
        ("\"model_type\": \"llama\"", "\"model_type\": \"gpt2\"", {
            "`gpt2`, known are llama, mistral, qwen2, qwen3, smollm3, chameleon, gemma3_text, gemma4_text, gemma4_unified_text"
        }),
        ("\"silu\"", "\"gelu\"", "hidden_act is `gelu`, known is silu"),
        (
            "null",
            "{\"rope_type\": \"warp\"}",
            "`warp`, known are default, linear, dynamic, llama3, yarn, longrope, proportional",
        ),
        ("null", "{\"rope_type\": \"linear\"}", "`factor` is missing"),
        ("\"num_key_value_heads\": 3", "\"num_key_value_heads\": 2", "not a multiple of num_key_value_heads 2"),
        ("\"hidden_size\": 576", "\"hidden_size\": 577", "hidden_size is 577"),
        ("\"vocab_size\": 49152", "\"vocab_size\": 0", "vocab_size is 0"),
        (
            "\"hidden_size\"",
            "\"sliding_window\": 64, \"use_sliding_window\": true, \"hidden_size\"",
            "sliding_window is 64, below max_position_embeddings 8192, but llama has no window",
        ),
        ("\"llama\"", "\"mistral\", \"attention_bias\": true", "attention_bias is true, but mistral has no such"),
        ("\"llama\"", "\"qwen2\", \"attention_bias\": true", "qwen2 has biases on q, k and v whatever it says"),
        ("\"llama\"", "\"qwen3\", \"mlp_bias\": true", "mlp_bias is true, but qwen3"),
        ("\"llama\"", "\"llama\", \"swin_norm\": true", "swin_norm is true, but llama"),
        ("\"llama\"", "\"llama\", \"qk_norm\": true", "qk_norm is true, but llama has no such norm"),
        ("\"llama\"", "\"qwen3\", \"qk_norm\": false", "qk_norm is false, but qwen3 always has that norm"),
        ("\"llama\"", "\"llama\", \"initializer_range\": -0.02", "initializer_range is -0.02, it must be"),
        ("\"llama\"", "\"chameleon\", \"head_dim\": 32", "head_dim is 32, but chameleon's is"),
        ("\"llama\"", "\"llama\", \"dropout\": 1.0", "dropout is 1, it must be"),
        ("\"llama\"", "\"llama\", \"attention_dropout\": -0.1", "attention_dropout is -0.1, it must be"),
        ("\"llama\"", "\"llama\", \"partial_rotary_factor\": 0.5", "partial_rotary_factor is 0.5, known is 1"),
        (
            "null",
            "{\"full_attention\": {\"rope_type\": \"default\"}}",
            "rope_scaling has rotations of its own for `full_attention`",
        ),
    ] {
        let error = format!("{:#}", parse(&SMOLLM2.replace(from, to)).validate().unwrap_err());
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn what_others_implement_is_told_apart_from_what_is_wrong() {
    let refused = |from: &str, to: &str| {
        let error = parse(&SMOLLM2.replace(from, to)).validate().unwrap_err();
        error.downcast_ref::<ConfigError>().cloned()
    };
    assert!(matches!(refused("\"llama\"", "\"gpt2\""), Some(ConfigError::ModelType { found, .. }) if found == "gpt2"));
    let rope = refused("null", "{\"rope_type\": \"warp\"}"); // through the context that names the section
    assert!(matches!(rope, Some(ConfigError::RopeType { found, .. }) if found == "warp"));
    assert_eq!(
        refused("\"silu\"", "\"gelu\""),
        Some(ConfigError::HiddenAct { key: "hidden_act", found: "gelu".into(), known: "silu" })
    );
    assert_eq!(refused("\"vocab_size\": 49152", "\"vocab_size\": 0"), None);
}

#[test]
fn open_names_file_and_key() {
    let folder = std::env::temp_dir().join(format!("vora-llm-config-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let error = format!("{:#}", LlmConfig::open(&folder).unwrap_err());
    assert!(error.contains("cannot read") && error.contains("config.json"), "{error}");
    std::fs::write(folder.join("config.json"), SMOLLM2.replace("\"vocab_size\": 49152,", "")).unwrap();
    let error = format!("{:#}", LlmConfig::open(&folder).unwrap_err());
    assert!(error.contains("config.json") && error.contains("missing field `vocab_size`"), "{error}");
    std::fs::write(folder.join("config.json"), SMOLLM2).unwrap();
    assert_eq!(LlmConfig::open(&folder).unwrap().hidden_size, 576);
    std::fs::remove_dir_all(&folder).unwrap();
}

const GEMMA4: &str = r#"{"model_type": "gemma4_unified_text", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 24,
    "num_hidden_layers": 7, "num_attention_heads": 8}"#;

/// GEMMA4 with these keys besides, or in place of its own.
fn gemma4(keys: &str) -> LlmConfig {
    let (mut config, keys): (Value, Value) =
        (serde_json::from_str(GEMMA4).unwrap(), serde_json::from_str(keys).unwrap());
    for (key, value) in keys.as_object().unwrap() {
        config[key] = value.clone();
    }
    parse(&config.to_string())
}

#[test]
fn layers_of_a_gemma_are_what_hf_makes_of_absent_keys() {
    let config = gemma4("{}");
    config.validate().unwrap();
    let windows: Vec<bool> = (0..7).map(|layer_idx| config.window(layer_idx) == Some(1024)).collect();
    assert_eq!(windows, [true, true, true, true, true, false, false]); // by the pattern, and the last
    let sizes = |layer_idx| (config.layer(layer_idx).head_dim, config.layer(layer_idx).num_key_value_heads);
    assert_eq!((sizes(0), sizes(5)), ((256, 4), (512, 4)));
    let (sliding, full) = (config.rotation(true).unwrap(), config.rotation(false).unwrap());
    assert_eq!((sliding.theta, &sliding.scaling, sliding.head_dim), (1e4, &RopeScaling::Default, 256));
    let quarter = RopeScaling::Proportional { factor: 1.0, partial_rotary_factor: 0.25 };
    assert_eq!((full.theta, &full.scaling, full.head_dim), (1e6, &quarter, 512));
    assert_eq!(full.inv_freq(1).iter().filter(|&&f| f > 0.0).count(), 64);

    // Both spellings of what layers without a window have of their own.
    let global = gemma4(r#"{"attention_k_eq_v": true, "num_global_key_value_heads": 2, "global_head_dim": 32}"#);
    let layer = global.layer(5);
    assert_eq!((layer.head_dim, layer.num_key_value_heads, layer.key_values), (32, 2, KeyValues::OwnKeys));
    assert_eq!(global.layer(0).key_values, KeyValues::Own);
    let ungated = gemma4(r#"{"num_global_key_value_heads": 2}"#);
    assert_eq!((ungated.layer(5).num_key_value_heads, ungated.layer(5).key_values), (4, KeyValues::Own));
    let newer = gemma4(r#"{"per_layer_config": {"5": {"head_dim": 32, "num_key_value_heads": 2}}}"#);
    let sizes = |layer_idx| (newer.layer(layer_idx).head_dim, newer.layer(layer_idx).num_key_value_heads);
    assert_eq!((sizes(5), sizes(6)), ((32, 2), (256, 4)));
    assert_eq!(parse(&serde_json::to_string(&newer).unwrap()), newer);
    assert!(serde_json::to_value(&newer).unwrap().get("hidden_act").is_none());

    let types = r#"["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention",
        "sliding_attention", "sliding_attention"]"#;
    let shared = gemma4(&format!(
        r#"{{"layer_types": {types}, "num_kv_shared_layers": 3, "use_double_wide_mlp": true, "hidden_size": 32}}"#
    ));
    shared.validate().unwrap();
    let layers: Vec<_> = (2..7).map(|i| (shared.layer(i).key_values, shared.layer(i).intermediate_size)).collect();
    let (own, of) = (KeyValues::Own, KeyValues::Of);
    assert_eq!(layers, [(own, 24), (own, 24), (of(1), 48), (of(3), 48), (of(1), 48)]); // the last has no window
}

#[test]
fn a_gemma_3_of_older_keys_rotates_as_one_of_newer_keys() {
    let older = parse(
        r#"{"model_type": "gemma3_text", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 24,
            "num_hidden_layers": 4, "num_attention_heads": 8, "sliding_window_pattern": 2, "rope_theta": 500000.0,
            "rope_local_base_freq": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}"#,
    );
    older.validate().unwrap();
    assert_eq!([0, 1, 2, 3].map(|i| older.window(i)), [Some(4096), None, Some(4096), None]);
    let (sliding, full) = (older.rotation(true).unwrap(), older.rotation(false).unwrap());
    assert_eq!((sliding.theta, sliding.scaling), (5000.0, RopeScaling::Default));
    assert_eq!((full.theta, full.scaling), (500_000.0, RopeScaling::Linear { factor: 8.0 }));
    let bare = LlmConfig { rope_theta: None, rope_local_base_freq: None, rope_scaling: None, ..older };
    assert_eq!([false, true].map(|slides| bare.rotation(slides).unwrap().theta), [1e6, 1e4]);
}

#[test]
fn what_is_not_built_of_gemma_4_is_named() {
    for (keys, says) in [
        (
            r#"{"model_type": "gemma4_text"}"#,
            "hidden_size_per_layer_input is 256: embeddings by layer are not built here",
        ),
        (r#"{"hidden_size_per_layer_input": 32}"#, "take a Gemma 4 whose config says 0"),
        (r#"{"enable_moe_block": true}"#, "enable_moe_block is true: experts are not built here; take a dense Gemma 4"),
        (r#"{"use_bidirectional_attention": "all"}"#, "use_bidirectional_attention is \"all\": every token"),
        (r#"{"hidden_activation": "relu"}"#, "hidden_activation is `relu`, known is gelu_pytorch_tanh"),
        (r#"{"num_kv_shared_layers": 7}"#, "no layer before those is of layer 0's type"),
        (r#"{"num_kv_shared_layers": 8}"#, "num_kv_shared_layers is 8, num_hidden_layers is 7"),
        (r#"{"per_layer_config": {"9": {}}}"#, "per_layer_config has a layer `9`, num_hidden_layers is 7"),
        (
            r#"{"per_layer_config": {"1": {"intermediate_size": 9}}}"#,
            "per_layer_config.1 has `intermediate_size`, known",
        ),
        (r#"{"per_layer_config": {"5": {"num_key_value_heads": 3}}}"#, "not a multiple of num_key_value_heads 3"),
        (r#"{"per_layer_config": {"6": {"head_dim": 32}}, "num_kv_shared_layers": 1}"#, "heads have other sizes"),
        (r#"{"final_logit_softcapping": 0.0}"#, "final_logit_softcapping is 0, it must be positive"),
        (
            r#"{"rope_parameters": {"full_attention": {"rope_type": "warp"}}}"#,
            "in rope_parameters.full_attention: rope type",
        ),
    ] {
        let error = format!("{:#}", gemma4(keys).validate().unwrap_err());
        assert!(error.contains(says), "{error}");
    }
    gemma4(r#"{"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}"#).validate().unwrap();
}
