//! `vora eval` on tiny models.

use std::path::Path;

use serde_json::{Value, json};

use super::{fails, succeeded, text, vora, workspace};

/// Trains with the smoke recipe, `set` over it: the folders of what was trained, and of that merged.
fn run(folder: &Path, set: &[&str]) -> [String; 2] {
    let [last, merged] = ["final", "merged"].map(|name| folder.join(name).to_string_lossy().into_owned());
    let output_dir = format!("output_dir={}", folder.display());
    let mut train = vec!["train", "--config", "crates/vora-train/recipes/smoke.yaml"];
    for set in set.iter().chain(&[&*output_dir, "evaluation_strategy=no", "save_steps=1000"]) {
        train.extend(["--set", set]);
    }
    succeeded(&vora(&train));
    succeeded(&vora(&["merge", &last, "--out", &merged, "--dtype", "f32"]));
    [last, merged]
}

/// In f32, unless `args` name another dtype.
fn eval(model: &str, args: &[&str]) -> Value {
    let dtype = if args.contains(&"--dtype") { &[][..] } else { &["--dtype", "f32"] };
    let output = vora(&[&["eval", model, "--json"], dtype, args].concat());
    serde_json::from_str(&succeeded(&output)).unwrap()
}

fn write_lines(path: &Path, records: &[Value]) -> String {
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    std::fs::write(path, lines.join("\n")).unwrap();
    path.to_string_lossy().into_owned()
}

/// A model whose pictures keep their shape, asked within several budgets.
#[test]
fn what_a_budget_costs_and_gives_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let shaped =
        ["max_steps=1", "model.max_image_tokens=16", "data.train.scenes={aspects: [0.4, 2.5], sides: [20, 80]}"];
    let [_, merged] = run(folder.path(), &shaped);
    let curve = folder.path().join("budgets.svg");
    let asked = ["--data", "scenes:shaped", "--limit", "4", "--max-tokens", "2"];
    let curve_args = ["--max-image-tokens", "4,9,36", "--curve", curve.to_str().unwrap()];
    let found = eval(&merged, &[&asked[..], &curve_args].concat());
    let tokens: Vec<f64> = (0..3).map(|idx| found["budgets"][idx]["image_tokens"].as_f64().unwrap()).collect();
    assert!(tokens[0] <= 4.0 && tokens[0] < tokens[1] && tokens[1] <= 9.0 && tokens[1] < tokens[2], "{found}");
    for budget in found["budgets"].as_array().unwrap() {
        let all = &budget["scores"]["all"];
        assert!(all["exact_match"].is_number() && all["blind_exact_match"].is_number(), "{found}");
    }
    assert!(std::fs::read_to_string(curve).unwrap().contains("wrong picture"));
    let refused = |model: &str, budget: &str, says: &str| {
        fails(&[&["eval", model, "--max-image-tokens", budget], &asked[..]].concat(), 1, &[says]);
    };
    refused(&merged, "0", "max_image_tokens is 0, a picture takes at least 1 token");
    let sliver = folder.path().join("sliver.png");
    vora_image::RgbImage::new(1000, 5).save(&sliver).unwrap();
    let says =
        "a picture of 1000 x 5 pixels cannot keep its shape within 16 tokens: crop it, or raise max_image_tokens";
    fails(&["ask", &merged, sliver.to_str().unwrap(), "What is it?"], 1, &[says]);
    let squares = folder.path().join("squares");
    let [_, squares] = run(&squares, &["max_steps=1"]);
    refused(&squares, "16", "the model's pictures become squares of one size");
}

/// Greedy answers are right just where the trainer says so, of a model that learned to answer some.
#[test]
fn exact_match_is_the_trainers() {
    let folder = tempfile::tempdir().unwrap();
    let model = "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
                 freeze_llm: false}";
    let set = [model, "max_steps=40", "learning_rate=1e-2", "gradient_accumulation_steps=1"];
    let [last, merged] = run(folder.path(), &[&set[..], &["per_device_train_batch_size=4"]].concat());
    let trainers = std::fs::read(folder.path().join("eval.json")).unwrap();
    let trainers: Value = serde_json::from_slice(&trainers).unwrap();
    for (model, split) in [(&last, "test"), (&last, "unseen"), (&merged, "test")] {
        let data = format!("scenes:{split}");
        let dtype = fixtures::dtype(); // that the run was trained in
        let found = eval(model, &["--data", &data, "--limit", "8", "--max-tokens", "24", "--dtype", &dtype]);
        let kinds = trainers[split].as_object().unwrap();
        assert_eq!(found["scores"].as_object().unwrap().len(), kinds.len(), "{found}");
        for (kind, expected) in kinds {
            let found = &found["scores"][kind];
            assert_eq!((&found["n"], &found["exact_match"]), (&expected["n"], &expected["exact_match"]), "{kind}");
            assert!(found["blind_exact_match"].is_number(), "{found}");
        }
        let right = trainers[split]["all"]["exact_match"].as_f64().unwrap();
        assert!(right > 0.0 && right < 1.0, "the model tells nothing: {trainers}");
    }
}

#[test]
fn a_model_is_scored() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let [last, merged] = run(&path("run"), &["max_steps=4", "learning_rate=2e-2"]);
    let images = workspace().join("fixtures/images");
    let images = images.to_string_lossy();
    let on_images = |name: &str, records: &[Value], extra: &[&str]| {
        let data = write_lines(&path(name), records);
        let args = ["--data", &data, "--images", &images, "--max-tokens", "4"];
        eval(&merged, &[&args, extra].concat())
    };
    captions(&on_images, &path("captions.json").to_string_lossy());
    short_answers(&on_images);
    perplexity(&last, &merged, folder.path());
    asked([&last, &merged], &images, folder.path());
    wrong(&merged, folder.path());
}

/// `vora ask` opens what `vora eval` opens, merged or with the adapters apart, and answers the same, in bf16 too and beside other
/// questions.
fn asked(models: [&str; 2], images: &str, folder: &Path) {
    let record = |question| json!({"image": "rgb.png", "question": question, "answers": ["yes"]});
    let records = [record("Is it red?"), record("What stands left of the blue ring, and why?")];
    let data = write_lines(&folder.join("asked.jsonl"), &records);
    let picture = Path::new(images).join("rgb.png");
    let out = folder.join("asked.json");
    for (model, dtype) in models.into_iter().flat_map(|model| ["f32", "bf16"].map(|dtype| (model, dtype))) {
        let out = out.to_string_lossy();
        eval(model, &["--data", &data, "--images", images, "--max-tokens", "6", "--out", &out, "--dtype", dtype]);
        let evaluated: Value = serde_json::from_slice(&std::fs::read(&*out).unwrap()).unwrap();
        let picture = picture.to_string_lossy();
        let args = ["ask", model, &picture, "Is it red?", "--max-new-tokens", "6", "--dtype", dtype, "--json"];
        let asked: Value = serde_json::from_str(&succeeded(&vora(&args))).unwrap();
        let answer = |value: &Value| value["answer"].as_str().unwrap().trim().to_owned();
        assert_eq!(answer(&asked), answer(&evaluated["answers"][0]), "{model} in {dtype}");
    }
}

type OnImages<'a> = &'a dyn Fn(&str, &[Value], &[&str]) -> Value;

/// A picture's references are the captions of all its records; what cannot be read is named.
fn captions(on_images: OnImages<'_>, out: &str) {
    let caption = |id: &str, frame: &str, caption: &str| {
        let turns = json!([{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": caption}]);
        json!({"id": id, "frames": [frame], "conversations": turns})
    };
    let mut records = [
        caption("a", "photo.jpg", "A photo."),
        caption("a", "photo.jpg", "A man's hat."),
        caption("b", "rgb.png", "Colours."),
        caption("b", "rgb.png", "unused"),
        caption("c", "palette.png", "A third."),
        json!({"id": "e", "frames": ["one.png"]}),
    ];
    for record in &mut records[2..4] {
        record["captions"] = json!(["Colours .", "Many colours ."]);
    }
    let found = on_images("captions.jsonl", &records, &["--out", out]);
    assert_eq!(found["task"], "caption");
    let all = &found["scores"]["all"];
    assert_eq!(all["n"], 3, "{found}");
    for name in ["bleu_1", "bleu_4", "rouge_l", "cider"] {
        assert!(all[name].is_number() && all[format!("blind_{name}")].is_number(), "{name}: {all}");
    }
    let left_out = found["left_out"].to_string();
    assert!(left_out.contains("captions.jsonl:6") && left_out.contains("`conversations`"), "{left_out}");
    assert_eq!(found["left_out"].as_array().unwrap().len(), 1, "{left_out}");

    let written: Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
    assert_eq!(written["scores"], found["scores"]);
    let answers = written["answers"].as_array().unwrap();
    let references: Vec<&Value> = answers.iter().map(|answer| &answer["references"]).collect();
    assert_eq!(
        references,
        [&json!(["A photo.", "A man's hat."]), &json!(["Colours .", "Many colours ."]), &json!(["A third."])]
    );
    assert!(answers.iter().all(|answer| answer["answer"].is_string() && answer["question"] == "What is it?"));
}

/// Yes/no and VQA, by the data; with `question` and `answers` alone, and several turns.
fn short_answers(on_images: OnImages<'_>) {
    let asked = |frame: &str, answers: Value| json!({"image": frame, "question": "Is it red?", "answers": answers});
    let pictures = ["photo.jpg", "rgb.png", "palette.png", "one.png"];
    let records: Vec<Value> =
        pictures.iter().zip(["yes", "no", "Yes", "no"]).map(|(frame, answer)| asked(frame, json!([answer]))).collect();
    let found = on_images("yesno.jsonl", &records, &[]);
    assert_eq!(found["task"], "yesno", "{found}");
    let all = &found["scores"]["all"];
    for name in ["accuracy", "precision", "recall", "f1", "yes_share", "blind_accuracy", "blind_yes_share"] {
        assert!(all[name].is_number(), "{name}: {all}");
    }
    let records: Vec<Value> =
        pictures.iter().map(|frame| asked(frame, json!([{"answer": "red"}, {"answer": "blue"}]))).collect();
    let records = [&records[..], &records[..1]].concat(); // one is asked twice
    let found = on_images("vqa-doubled.jsonl", &records, &[]);
    assert_eq!((&found["task"], &found["scores"]["all"]["n"]), (&json!("vqa"), &json!(5)));
    let found = on_images("vqa.jsonl", &records, &["--limit", "3"]);
    assert_eq!((&found["task"], &found["scores"]["all"]["n"]), (&json!("vqa"), &json!(3)));

    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let turns = [turn("human", "What?"), turn("gpt", "red"), turn("human", "Where?"), turn("gpt", "top left")];
    let found = on_images("turns.jsonl", &[json!({"image": "rgb.png", "conversations": turns})], &[]);
    assert_eq!((&found["task"], &found["scores"]["all"]["n"]), (&json!("exact"), &json!(2)));
    assert!(found["scores"]["all"]["blind_exact_match"].is_null(), "there is no other picture: {found}");
}

/// The same before and after merging, and for the plain LLM what the reference says. That the adapters act is seen on
/// what they were taught: on answers, perplexity falls by a ninth in four steps; on other text it hardly moves.
fn perplexity(last: &str, merged: &str, folder: &Path) {
    let golden = std::fs::read(workspace().join("fixtures/golden/perplexity.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let answers = ["yes", "no", "red", "blue", "green", "circle", "two", "three", "top left"].join("\n");
    let texts =
        [("held-out.txt", golden["text"].as_str().unwrap(), 218), ("answers.txt", &vec![answers; 8].join("\n"), 254)];
    for (name, text, _) in texts {
        std::fs::write(folder.join(name), text).unwrap();
    }
    let perplexity = |model: &str, (name, _, tokens): (&str, &str, u64)| {
        let text = folder.join(name).to_string_lossy().into_owned();
        let found = eval(model, &["--task", "perplexity", "--text", &text, "--max-length", "64"]);
        assert_eq!((&found["task"], &found["tokens"]), (&json!("perplexity"), &json!(tokens)), "{found}");
        found["perplexity"].as_f64().unwrap()
    };
    let case = &golden["cases"][2];
    assert_eq!((&case["max_length"], &case["stride"]), (&json!(64), &json!(32)));
    let llm = "fixtures/tiny/llm";
    let plain = perplexity(llm, texts[0]);
    assert!((plain / case["perplexity"].as_f64().unwrap() - 1.0).abs() < 1e-5, "{plain}, expected {case}");
    // A tokenizer that begins every text with a token, as Llama's do.
    let with_first = folder.join("with-first");
    std::fs::create_dir(&with_first).unwrap();
    for file in std::fs::read_dir(workspace().join(llm)).unwrap() {
        let file = file.unwrap();
        std::fs::write(with_first.join(file.file_name()), std::fs::read(file.path()).unwrap()).unwrap();
    }
    let path = with_first.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let case = &golden["first_token"];
    tokenizer["post_processor"] = case["post_processor"].clone();
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let found = perplexity(&with_first.to_string_lossy(), (texts[0].0, texts[0].1, case["tokens"].as_u64().unwrap()));
    assert!((found / case["perplexity"].as_f64().unwrap() - 1.0).abs() < 1e-5, "{found}, expected {case}");

    let [plain, apart, merged] = [llm, last, merged].map(|model| perplexity(model, texts[1]));
    assert!((apart / merged - 1.0).abs() < 1e-3, "merging changed it: {apart}, {merged}");
    assert!(apart < 0.95 * plain, "the adapters taught nothing: {apart}, {plain}");
}

fn wrong(merged: &str, folder: &Path) {
    let data = folder.join("yesno.jsonl").to_string_lossy().into_owned();
    fails(&["eval", merged], 2, &["--data"]);
    fails(&["eval", merged, "--data", &data, "--text", &data], 2, &["cannot be used with"]);
    fails(&["eval", merged, "--data", &data, "--stride", "4"], 2, &["cannot be used with"]);
    fails(
        &["eval", merged, "--data", "scenes:train"],
        1,
        &["unknown split `train`: use scenes:test, scenes:unseen or scenes:shaped"],
    );
    fails(&["eval", merged, "--data", &data, "--task", "perplexity"], 1, &["give --text instead of --data"]);
    fails(&["eval", merged, "--text", &data, "--task", "vqa"], 1, &["no vqa: give --data"]);
    let images = ["--images", "fixtures/images"];
    let blind = [&["eval", "fixtures/tiny/llm", "--data", &data], &images[..]].concat();
    fails(&blind, 1, &["no question could be asked", "language model alone, which takes no picture"]);
    // The pictures do not lie beside the data.
    fails(&["eval", merged, "--data", &data], 1, &["4 records name a picture that is not there", "photo.jpg"]);
    let output = vora(&["eval", merged, "--data", "scenes:test", "--limit", "2", "--task", "yesno"]);
    assert!(text(&output.stderr).contains("not yes or no: choose another --task"), "{}", text(&output.stderr));
}
