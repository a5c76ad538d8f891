//! `vora serve`, `vora chat` and `vora bench` on a tiny language model.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use vora_lora::{BaseModel, LoraConfig, save_adapter};

use super::{fails, program, succeeded, text, vora};

const MODEL: &str = "fixtures/tiny/llm";

/// The program, serving; and where.
fn serving() -> (Child, String) {
    let mut command = program();
    command.args(["serve", MODEL, "--port", "0", "--served-model-name", "tiny", "--cache", "4MiB"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("`tiny` answers on http://").unwrap_or_else(|| panic!("{line}"));
    (child, address.to_owned())
}

fn asked(address: &str, request: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).unwrap();
    let length = request.len();
    write!(socket, "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{request}").unwrap();
    socket
}

fn signal(name: &str, child: &Child) {
    assert!(Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn a_signal_lets_running_requests_end_and_a_second_one_does_not() {
    let request = r#"{"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 400, "logit_bias": {"2": -100}, "stream": true}"#;
    let (mut child, address) = serving();
    let mut socket = asked(&address, request);
    let mut first = [0; 64];
    assert!(socket.read(&mut first).unwrap() > 0);
    signal("TERM", &child);
    let mut rest = String::new();
    socket.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]\n\n"), "{rest}");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(TcpStream::connect(&address).is_err());

    let (mut child, address) = serving();
    let mut socket = asked(&address, request);
    assert!(socket.read(&mut first).unwrap() > 0);
    signal("INT", &child);
    std::thread::sleep(std::time::Duration::from_millis(20));
    signal("INT", &child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_server_says_why_it_does_not_start() {
    fails(
        &["serve", MODEL, "--host", "0.0.0.0", "--port", "0"],
        1,
        &["0.0.0.0 can be reached", "--api-key or VORA_API_KEY"],
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fails(&["serve", MODEL, "--port", &port], 1, &[&format!("cannot listen on 127.0.0.1:{port}")]);
    fails(&["serve", "no/model", "--port", "0"], 1, &["not in the cache"]);
    fails(&["serve", MODEL, "--cache", "5"], 2, &["as 5GB or 500MiB"]);
}

#[test]
fn a_conversation_comes_by_lines() {
    let talk = |lines: &str, extra: &[&str]| {
        let mut command = program();
        command.args([&["chat", MODEL, "--dtype", "f32", "--max-new-tokens", "8"], extra].concat());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let alone = succeeded(&talk("Hello?\n", &[]));
    let asked = succeeded(&vora(&["ask", MODEL, "Hello?", "--dtype", "f32", "--max-new-tokens", "8"]));
    assert_eq!(alone, asked);
    let two = succeeded(&talk("Hello?\n/reset\n\nHello?\n/quit\nHello?\n", &[]));
    assert_eq!(two, format!("{alone}{alone}"));
    let briefly = succeeded(&talk("/system Be brief.\nHello?\n", &[]));
    assert_eq!(briefly, succeeded(&talk("Hello?", &["--system", "Be brief."])));
    assert_ne!(briefly, alone);
    let output = talk("/image no.png\n/fly\n/image fixtures/images/rgb.png\nWhat?\nHello?\n", &[]);
    assert_eq!(succeeded(&output), alone);
    let said = text(&output.stderr);
    for part in ["no.png", "there is no /fly", "takes no picture"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

/// A PEFT adapter over the model.
fn adapter(folder: &Path, seed: u64) {
    let random = fixtures::Random::new(seed);
    let tensors = (0..4).flat_map(|layer| {
        let name = |half: &str| format!("model.layers.{layer}.self_attn.q_proj.{half}.weight");
        [(name("lora_A"), random.normal([2, 32])), (name("lora_B"), random.normal([32, 2]))]
    });
    let (lora, tensors) = (LoraConfig::of_modules(2, ["q_proj"]), tensors.collect::<Vec<_>>());
    save_adapter(folder, &lora, BaseModel::causal_lm("tiny"), &tensors).unwrap();
}

#[test]
fn adapters_are_asked_by_name() {
    let root = tempfile::tempdir().unwrap();
    let modules: Vec<String> = [("cats", 1), ("dogs", 2)]
        .map(|(name, seed)| {
            adapter(&root.path().join(name), seed);
            format!("{name}={}", root.path().join(name).display())
        })
        .to_vec();
    let modules = ["--lora-modules", &modules[0], &modules[1]];
    let ask = |args: &[&str]| {
        succeeded(&vora(&[&["ask", MODEL, "Hello?", "--dtype", "f32", "--max-new-tokens", "8"], args].concat()))
    };
    let by = |name: &'static str| ask(&[&modules[..], &["--adapter", name]].concat());
    let (base, cats, dogs) = (ask(&modules), by("cats"), by("dogs"));
    assert!(base == ask(&[]) && cats != base && dogs != base && cats != dogs, "{base} {cats} {dogs}");

    let mut command = program();
    command.args(["chat", MODEL, "--dtype", "f32", "--max-new-tokens", "8", "--adapter", "dogs"]).args(modules);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Hello?\n").unwrap();
    assert_eq!(succeeded(&child.wait_with_output().unwrap()), dogs);

    let args =
        ["bench", MODEL, "--prompt", "40", "--new", "6", "--batch", "3", "--rounds", "1", "--cache", "4MiB", "--json"];
    let report = succeeded(&vora(&[&args[..], &modules, &["--adapter", "cats,base,dogs"]].concat()));
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["adapters"], serde_json::json!(["cats", "base", "dogs"]));

    let modules = ["ask", MODEL, "Hello?", "--lora-modules"];
    fails(&[&modules[..], &["cats"]].concat(), 2, &["`cats` is not NAME=FOLDER"]);
    fails(&[&modules[..], &["cats=no/where"]].concat(), 1, &["the adapter `cats`", "no/where"]);
    let dora = fixtures::root().join("golden/peft_folders/dora");
    let dora = format!("dora={}", dora.display());
    fails(
        &["serve", MODEL, "--port", "0", "--lora-modules", &dora],
        1,
        &["the adapter `dora`", "is a DoRA (`use_dora`)"],
    );
    fails(&["ask", MODEL, "Hello?", "--adapter", "birds"], 1, &["there is no adapter `birds`"]);
}

#[test]
fn a_model_is_measured() {
    let args = ["bench", MODEL, "--prompt", "40", "--new", "6", "--batch", "1,3", "--rounds", "1", "--cache", "4MiB"];
    let table = succeeded(&vora(&args));
    assert!(table.contains("40 tokens of prompt, 6 of answer") && table.contains("tokens/s together"), "{table}");
    let report: Value = serde_json::from_str(&succeeded(&vora(&[&args[..], &["--json"]].concat()))).unwrap();
    assert_eq!((&report["prompt_tokens"], &report["batches"][1]["batch"]), (&40.into(), &3.into()));
    assert!(report["batches"][0]["tokens_per_second"].as_f64().unwrap() > 0.0);
    fails(&["bench", MODEL, "--batch", "0"], 1, &["--batch has a 0"]);
}
