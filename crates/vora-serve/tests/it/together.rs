//! What the `openai` package sends is answered as it expects, and each as if it were alone (row 38).

use serde_json::{Value, json};

use crate::client::{Reply, get, say};
use crate::model::{assistant_of_several, assistant_with, picture};
use crate::{about, ask, loading, long, serve};

/// A request as the package sent it.
fn recorded(name: &str) -> Vec<u8> {
    std::fs::read(fixtures::root().join("clients/openai").join(format!("{name}.http"))).unwrap()
}

/// The names and types of all that is in a JSON value; of a list, of its first element.
fn shape(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "bool".to_owned(),
        Value::Number(_) => "number".to_owned(),
        Value::String(_) => "string".to_owned(),
        Value::Array(items) => format!("[{}]", items.first().map(shape).unwrap_or_default()),
        Value::Object(fields) => {
            let mut fields: Vec<String> =
                fields.iter().map(|(name, value)| format!("{name}: {}", shape(value))).collect();
            fields.sort_unstable(); // another crate decides in which order JSON is kept
            format!("{{{}}}", fields.join(", "))
        }
    }
}

const HEAD: &str = "created: number, id: string, model: string, object: string";
const USAGE: &str = "usage: {completion_tokens: number, prompt_tokens: number, prompt_tokens_details: {cached_tokens: number}, total_tokens: number}";

/// The shape of a whole answer with these choices.
fn whole(choice: &str) -> String {
    let (id, object) = HEAD.split_at(HEAD.find("object").unwrap());
    format!("{{choices: [{choice}], {id}{object}, system_fingerprint: string, {USAGE}}}")
}

const MESSAGE: &str = "message: {content: string, refusal: null, role: string}";

fn said(reply: &Reply) -> Value {
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.header("content-type"), Some("application/json"));
    reply.json()
}

#[test]
fn the_openai_package_is_answered() {
    let server = serve(|config, _| config.api_keys = vec!["secret".to_owned()]);
    let models = said(&say(&server, &recorded("models")));
    assert_eq!(models["object"], "list");
    let names: Vec<&Value> = models["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(names, ["tiny", "tiny:base"]);

    for name in ["chat", "picture"] {
        let answer = said(&say(&server, &recorded(name)));
        let choice = format!("{{finish_reason: string, index: number, logprobs: null, {MESSAGE}}}");
        assert_eq!(shape(&answer), whole(&choice), "{name}");
        assert_eq!(answer["object"], "chat.completion");
        assert!(["stop", "length"].contains(&answer["choices"][0]["finish_reason"].as_str().unwrap()));
    }
    let answer = said(&say(&server, &recorded("everything")));
    let entry = "bytes: [number], logprob: number, token: string";
    let logprobs = format!("{{content: [{{{entry}, top_logprobs: [{{{entry}}}]}}], refusal: null}}");
    let choice = format!("{{finish_reason: string, index: number, logprobs: {logprobs}, {MESSAGE}}}");
    assert_eq!(shape(&answer), whole(&choice));
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    for choice in answer["choices"].as_array().unwrap() {
        let tokens = choice["logprobs"]["content"].as_array().unwrap();
        assert!(tokens.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 3));
    }
}

#[test]
fn the_openai_package_reads_the_stream() {
    let server = serve(|config, _| config.api_keys = vec!["secret".to_owned()]);
    let chunk = |delta: &str, reason: &str, more: &str| {
        let choice = format!("{{delta: {delta}, finish_reason: {reason}, index: number, logprobs: null}}");
        format!("{{choices: [{choice}], {HEAD}, system_fingerprint: string{more}}}")
    };
    for (name, more) in [("stream", ", usage: null"), ("picture_stream", "")] {
        let reply = say(&server, &recorded(name));
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/event-stream")), "{}", reply.text());
        let mut events = reply.events();
        if name == "stream" {
            let last = events.pop().unwrap();
            assert_eq!(shape(&last), format!("{{choices: [], {HEAD}, system_fingerprint: string, {USAGE}}}"));
            assert!(last["usage"]["completion_tokens"].as_u64().unwrap() <= 8);
        }
        assert_eq!(shape(&events[0]), chunk("{content: string, role: string}", "null", more));
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        let end = events.pop().unwrap();
        assert_eq!(shape(&end), chunk("{}", "string", more));
        for event in &events[1..] {
            assert_eq!(shape(event), chunk("{content: string}", "null", more));
            assert_eq!((&event["id"], &event["object"]), (&end["id"], &"chat.completion.chunk".into()));
        }
    }
}

fn text(reply: &Reply) -> String {
    said(reply)["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// 38
#[test]
fn each_is_answered_as_if_it_were_alone() {
    let requests: Vec<Value> = (0..12u8)
        .map(|at| match at % 3 {
            0 => long(["Is it red?", "Why?", "Where is the ring?", "What?"][usize::from(at / 3)], 24),
            1 => about(&picture([at * 20, 7, 90]), "What colour is it?", 24),
            _ => {
                let mut other = about(&picture([at * 20, 7, 90]), "What colour is it?", 16);
                other["model"] = "tiny:base".into();
                other
            }
        })
        .collect();
    let alone: Vec<String> = {
        let server = serve(|_, engine| (engine.max_batch, engine.prefix_caching) = (1, false));
        requests.iter().map(|request| text(&ask(&server, request))).collect()
    };
    let server = serve(|_, _| {});
    for round in 0..2 {
        let together: Vec<String> = std::thread::scope(|scope| {
            let asked: Vec<_> = requests.iter().map(|request| scope.spawn(|| text(&ask(&server, request)))).collect();
            asked.into_iter().map(|answer| answer.join().unwrap()).collect()
        });
        assert_eq!(together, alone, "round {round}");
    }
    let cached = said(&ask(&server, &requests[1]))["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached > 0, "the third time it is known");
    let differ = text(&ask(&server, &requests[1])) != {
        let mut base = requests[1].clone();
        base["model"] = "tiny:base".into();
        text(&ask(&server, &base))
    };
    assert!(differ, "adapters change nothing");
}

#[test]
fn adapters_answer_by_their_names() {
    let start = |most: usize| {
        let (server, engine) = loading(|_, engine| (engine.max_batch, engine.prefix_caching) = (most, most > 1));
        server.answer_with(assistant_of_several(), engine).unwrap();
        server
    };
    let server = start(8);
    let listed = said(&get(&server, "/v1/models"))["data"].clone();
    let listed: Vec<_> =
        listed.as_array().unwrap().iter().map(|model| (model["id"].clone(), model["parent"].clone())).collect();
    let none = Value::Null;
    assert_eq!(listed[..2], [("tiny".into(), none.clone()), ("tiny:base".into(), none)]);
    assert_eq!(listed[2..], [("cats".into(), "tiny".into()), ("dogs".into(), "tiny".into())]);
    assert_eq!(get(&server, "/v1/models/cats").json()["parent"], "tiny");

    let requests: Vec<Value> = ["tiny", "cats", "dogs", "tiny:base", "cats", "dogs"]
        .into_iter()
        .enumerate()
        .map(|(at, model)| {
            let mut request = about(&picture([200, 7, 90]), ["What colour is it?", "Why?"][at / 4], 20);
            request["model"] = model.into();
            request["logprobs"] = true.into();
            request
        })
        .collect();
    let tokens = |reply: &Reply| said(reply)["choices"][0]["logprobs"].clone();
    let alone: Vec<Value> = {
        let server = start(1);
        requests.iter().map(|request| tokens(&ask(&server, request))).collect()
    };
    for (at, answer) in alone.iter().enumerate().take(4) {
        assert!(!alone[..at].contains(answer), "{alone:?}");
    }
    for round in 0..2 {
        let together: Vec<Value> = std::thread::scope(|scope| {
            let asked: Vec<_> = requests.iter().map(|request| scope.spawn(|| tokens(&ask(&server, request)))).collect();
            asked.into_iter().map(|answer| answer.join().unwrap()).collect()
        });
        assert_eq!(together, alone, "round {round}");
    }
    let mut request = requests[1].clone();
    assert_eq!(said(&ask(&server, &request))["model"], "cats");
    request["model"] = "birds".into();
    let reply = ask(&server, &request);
    let (message, param, code) = reply.error();
    assert_eq!((reply.status, param.as_str(), code.as_str()), (404, "model", "model_not_found"));
    assert_eq!(message, "there is no model `birds` here, only tiny, tiny:base, cats, dogs");

    let (server, engine) = loading(|config, _| config.name = "cats".to_owned());
    let error = server.answer_with(assistant_of_several(), engine).unwrap_err().to_string();
    assert!(error.contains("the adapter `cats` has a name of the served model"), "{error}");
}

#[test]
fn seeds_stops_and_streams_agree() {
    let server = serve(|_, _| {});
    let mut request = long("Is it red?", 40);
    request["temperature"] = 1.0.into();
    request["seed"] = 11.into();
    let whole = text(&ask(&server, &request));
    assert_eq!(whole, text(&ask(&server, &request)));
    request["stream"] = true.into();
    let streamed: String = ask(&server, &request)
        .events()
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(streamed, whole);
    request["stream"] = false.into();
    let stop: String = whole.chars().skip(10).take(3).collect();
    request["stop"] = stop.clone().into();
    let cut = said(&ask(&server, &request));
    assert_eq!(cut["choices"][0]["message"]["content"], whole[..whole.find(&stop).unwrap()]);
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
    request["n"] = 3.into();
    request["stop"] = Value::Null;
    let choices = said(&ask(&server, &request))["choices"].clone();
    assert_eq!(choices[0]["message"]["content"], whole);
    assert_ne!(choices[0]["message"], choices[1]["message"]);
    assert_eq!(get(&server, "/v1/models").json()["data"][0]["id"], "tiny");
}

#[test]
fn what_a_request_leaves_out_is_as_the_folder_has_it() {
    let server = |generation: Value| {
        let (server, engine) = loading(|_, _| {});
        let assistant = assistant_with(|folder| {
            std::fs::write(folder.join("generation_config.json"), generation.to_string()).unwrap();
        });
        server.answer_with(assistant, engine).unwrap();
        server
    };
    let answer = |server: &_, changed: &[(&str, Value)]| {
        let mut request = long("What is it?", 12);
        request["temperature"] = Value::Null;
        request["seed"] = 5.into();
        changed.iter().for_each(|(key, value)| request[key] = value.clone());
        said(&ask(server, &request))["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let (plain, own) = (server(json!({})), server(json!({"do_sample": true, "top_k": 1, "temperature": 0.6})));
    let greedy = answer(&plain, &[("temperature", 0.into())]);
    assert_eq!(answer(&own, &[]), greedy);
    assert_ne!(answer(&plain, &[]), greedy);
    // What it says goes first.
    assert_eq!(answer(&own, &[("top_k", 0.into()), ("temperature", 1.into())]), answer(&plain, &[]));
}
