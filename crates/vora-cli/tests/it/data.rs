//! `vora data show` tells the truth about samples, for each kind of model, without weights.

use super::{fails, succeeded, text, vora};

const SMOKE: &str = "crates/vora-train/recipes/smoke.yaml";
const CONVERSATIONS: &str = "data={train: {data_fetch: {data_paths: [{anno_path: \
                             fixtures/tiny/data/conversations.jsonl, image_folder: fixtures/tiny/data/images}]}}}";

fn shown(args: &[&str]) -> Vec<serde_json::Value> {
    let said = succeeded(&vora(&[&["data", "show", SMOKE, "--json"], args].concat()));
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_conversation_is_shown_as_it_is_learned() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().to_string_lossy().into_owned();
    let said = succeeded(&vora(&["data", "show", SMOKE, "--set", CONVERSATIONS, "--images", &images]));
    for part in [
        "sample 0: train-0,",
        "<|im_start|>user\n[image 4x4]\nWhat color?<|im_end|>\n<|im_start|>assistant\n\u{27e6}green<|im_end|>\u{27e7}\n",
        "\u{27e6}cross<|im_end|>\u{27e7}\n",
        "turn: \"Is it a square?\"\n  answer \"no\", labels \"no\": they agree",
    ] {
        assert!(said.contains(part), "no `{part}` in\n{said}");
    }
    assert!(!said.contains('\x1b'), "{said}");
    let picture = vora_image::open_image(&folder.path().join("0-0.png")).unwrap();
    assert_eq!(picture.dimensions(), (56, 56));
    // What is cut to fit loses whole turns.
    let cut = format!("{}, data_preprocess: {{max_seq_len: 60}}}}}}", CONVERSATIONS.strip_suffix("}}").unwrap());
    let [whole, cut] = [CONVERSATIONS, &cut].map(|data| shown(&["--set", data]).remove(0));
    let answers = |sample: &serde_json::Value| sample["answers"].as_array().unwrap().len();
    assert!(answers(&whole) == 4 && (1..4).contains(&answers(&cut)), "{cut}");
    assert!(cut["tokens"].as_u64().unwrap() <= 60 && cut["agree"] == true, "{cut}");
}

#[test]
fn words_that_end_an_answer_are_no_difference() {
    // One token that ends a text, at the very end; each turn before it ends in words.
    let template = "{% for m in messages %}{{ '<' + m.role + '>\\n' + m.content + '<end>\\n' }}\
                    {% endfor %}{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% else %}{{ eos_token }}{% endif %}";
    let template = format!("model.chat_template={}", serde_json::json!(template));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("two.jsonl");
    let turn = |from: &str, value: &str| format!("{{\"from\": \"{from}\", \"value\": \"{value}\"}}");
    let turns = [turn("human", "One?"), turn("gpt", "It is one."), turn("human", "Two?"), turn("gpt", "\\nIt is two.")];
    std::fs::write(&path, format!("{{\"conversations\": [{}]}}\n", turns.join(", "))).unwrap();
    let data = format!("data={{train: {{data_fetch: {{data_paths: [{{anno_path: '{}'}}]}}}}}}", path.display());
    let sample = shown(&["--set", &data, "--set", &template]).remove(0);
    let answers: Vec<_> = sample["answers"].as_array().unwrap().iter().map(|answer| &answer["labels"]).collect();
    assert_eq!(answers, ["It is one.<end>\n", "\nIt is two.<end>\n"]);
    assert_eq!(sample["agree"], true, "{sample}");
}

#[test]
fn every_kind_of_model_has_its_samples_shown() {
    let systems = [
        ("model.lora.r=4", false),
        ("model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2}", false),
        ("model={type: chameleon, llm: fixtures/tiny/llm, image_size: 56, vqmodel: {steps: 1}}", true),
    ];
    for (model, is_marked) in systems {
        let samples = shown(&["--count", "2", "--index", "3", "--set", model]);
        assert_eq!(samples.iter().map(|sample| sample["index"].as_u64().unwrap()).collect::<Vec<_>>(), [3, 4]);
        for sample in samples {
            assert!(sample["agree"] == true && sample["branches"] == 4, "{model}: {sample}");
            let runs = sample["runs"].as_array().unwrap();
            let tokens = |key: &dyn Fn(&serde_json::Value) -> bool| -> u64 {
                runs.iter().filter(|run| key(run)).map(|run| run["tokens"].as_u64().unwrap()).sum()
            };
            assert_eq!(tokens(&|run| run["learned"] == true), sample["learned"].as_u64().unwrap());
            // The token that ends each branch is in the labels alone.
            assert_eq!(tokens(&|_| true), sample["tokens"].as_u64().unwrap() + 4);
            let text: String = runs.iter().map(|run| run["text"].as_str().unwrap()).collect();
            assert!(text.contains("[image ") && text.contains("[begin image][image ") == is_marked, "{text}");
        }
    }
}

#[test]
fn a_bad_record_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.jsonl");
    std::fs::write(
        &path,
        "{\"frames\": [\"gone.png\"], \"conversations\": [{\"from\": \"human\", \"value\": \"<image>\"}, \
        {\"from\": \"gpt\", \"value\": \"a\"}]}\n",
    )
    .unwrap();
    let data = format!(
        "data={{train: {{data_fetch: {{data_paths: [{{anno_path: {}, image_folder: {}}}]}}}}}}",
        path.display(),
        folder.path().display()
    );
    let output = vora(&["data", "show", SMOKE, "--set", &data]);
    let said = text(&output.stdout);
    assert!(said.contains("sample 0 is bad") && said.contains("gone.png"), "{said}");
    fails(&["data", "show", SMOKE, "--set", &data, "--index", "1"], 1, &["--index is 1, the data has 1 samples"]);
}

#[test]
fn captions_become_questions_that_a_run_learns_from() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("contrast.jsonl").to_string_lossy().into_owned();
    let said = succeeded(&vora(&["data", "contrast", "fixtures/tiny/data/conversations.jsonl", "--out", &out]));
    let data = format!(
        "data={{train: {{data_fetch: {{data_paths: [{{anno_path: {out}, image_folder: fixtures/tiny/data/images}}]}}}}}}"
    );
    let samples = shown(&["--set", &data, "--count", "999"]);
    assert!(said.starts_with(&format!("{} questions about {} pictures", samples.len(), samples.len() / 2)), "{said}");
    let answer = |sample: &serde_json::Value| sample["answers"][0]["answer"].as_str().unwrap().to_owned();
    for pair in samples.chunks(2) {
        assert_eq!([answer(&pair[0]), answer(&pair[1])], ["yes", "no"]);
        assert!(pair.iter().all(|sample| sample["agree"] == true && sample["images"].as_array().unwrap().len() == 1));
    }
    fails(&["data", "contrast", "no.jsonl", "--out", &out], 1, &["no.jsonl"]);
}
