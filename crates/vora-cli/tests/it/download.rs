//! `vora download` from a hub on this machine.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::thread;

use sha2::{Digest, Sha256};

use super::{program, succeeded, text};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Starts a hub that has `org/tiny`, the tiny LLM of the fixtures, as `main` and as `v1.0`, and gives its URL.
fn hub() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || answer(&stream.unwrap()));
        }
    });
    endpoint
}

/// Answers one request; a connection serves no second one.
fn answer(mut stream: &TcpStream) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    lines.take_while(|line| !line.is_empty()).for_each(drop);
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let folder = fixtures::root().join("tiny/llm");
    let body = match path.strip_prefix("/api/models/org/tiny/revision/") {
        Some("main" | "v1.0") => {
            let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
            let files: Vec<_> =
                names.map(|name| serde_json::json!({ "rfilename": name.into_string().unwrap() })).collect();
            Some(serde_json::json!({ "sha": COMMIT, "siblings": files }).to_string().into())
        }
        Some(_) => None,
        None => {
            let file = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/"));
            file.and_then(|file| std::fs::read(folder.join(file)).ok())
        }
    };
    let status = if path.contains("gated") {
        "401 Unauthorized"
    } else if body.is_none() {
        "404 Not Found"
    } else {
        "200 OK"
    };
    let body: Vec<u8> = body.unwrap_or_default();
    let etag = format!("{:x}", Sha256::digest(&body));
    let head = format!("HTTP/1.1 {status}\r\nETag: \"{etag}\"\r\nContent-Length: {}\r\n", body.len());
    let _ = write!(stream, "{head}Connection: close\r\n\r\n");
    if method == "GET" {
        let _ = stream.write_all(&body);
    }
}

/// `vora` that asks this hub and knows this cache alone.
fn vora(endpoint: &str, cache: &Path, args: &[&str]) -> Output {
    command(endpoint, cache, args).output().unwrap()
}

fn command(endpoint: &str, cache: &Path, args: &[&str]) -> Command {
    let mut command = program();
    for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"] {
        command.env_remove(name);
    }
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    command.args(args).env("HF_ENDPOINT", endpoint).env("HF_HUB_CACHE", cache);
    command
}

#[test]
fn a_model_is_fetched_and_then_found_by_its_name() {
    let (endpoint, cache) = (hub(), tempfile::tempdir().unwrap());
    let snapshot = cache.path().join("models--org--tiny/snapshots").join(COMMIT);
    let line = format!("org/tiny {}\n", snapshot.display());
    let said = text(&vora(&endpoint, cache.path(), &["inspect", "org/tiny"]).stderr);
    assert!(said.contains("`vora download org/tiny` fetches it"), "{said}");
    assert_eq!(succeeded(&vora(&endpoint, cache.path(), &["download", "org/tiny"])), line);
    assert!(succeeded(&vora(&endpoint, cache.path(), &["inspect", "org/tiny"])).contains("model.layers"));
    // What is there is not asked for again.
    let offline =
        command(&endpoint, cache.path(), &["download", "org/tiny", "org/tiny"]).env("HF_HUB_OFFLINE", "1").output();
    assert_eq!(succeeded(&offline.unwrap()), line.repeat(2));
}

/// As `cargo xtask download` leaves it where it took a model from PyPI.
#[test]
fn what_was_converted_gives_way_to_the_hubs() {
    let (endpoint, cache) = (hub(), tempfile::tempdir().unwrap());
    let repo = vora_hub::Cache::at(cache.path()).repo("org/tiny").unwrap();
    std::fs::create_dir_all(repo.snapshot("pypi-tiny-1.0")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixtures::root().join("tiny/llm").join(file), repo.snapshot("pypi-tiny-1.0").join(file)).unwrap();
    }
    repo.set_commit(vora_hub::MAIN, "pypi-tiny-1.0").unwrap();
    assert!(succeeded(&vora(&endpoint, cache.path(), &["inspect", "org/tiny"])).contains("model.layers"));
    let said = succeeded(&vora(&endpoint, cache.path(), &["download", "org/tiny"]));
    assert_eq!(said, format!("org/tiny {}\n", repo.snapshot(COMMIT).display()));
    assert_eq!(repo.commit(vora_hub::MAIN).as_deref(), Some(COMMIT));
}

#[test]
fn a_revision_goes_into_the_cache_that_is_named() {
    let (endpoint, folder) = (hub(), tempfile::tempdir().unwrap());
    let cache = folder.path().join("own");
    let args = ["download", "org/tiny", "--revision", "v1.0", "--cache", cache.to_str().unwrap()];
    let said = succeeded(&vora(&endpoint, &folder.path().join("not-used"), &args));
    let snapshot = cache.join("models--org--tiny/snapshots").join(COMMIT);
    assert_eq!(said, format!("org/tiny {}\n", snapshot.display()));
    assert!(!folder.path().join("not-used").exists());
    // The name alone means `main`, which nobody fetched; the folder is a model like any other.
    let said = text(&vora(&endpoint, &cache, &["inspect", "org/tiny"]).stderr);
    assert!(said.contains("not in the cache"), "{said}");
    assert!(succeeded(&vora(&endpoint, &cache, &["inspect", snapshot.to_str().unwrap()])).contains("model.layers"));
}

#[test]
fn errors_say_what_where_and_what_to_do() {
    let (endpoint, cache) = (hub(), tempfile::tempdir().unwrap());
    let fails = |command: &mut Command, parts: &[&str]| {
        let output = command.output().unwrap();
        let said = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""), "{said}");
        for part in parts {
            assert!(said.contains(part), "`{part}` is missing in: {said}");
        }
        assert_eq!(said.lines().count(), 1, "{said}");
    };
    let download = |endpoint: &str, args: &[&str]| command(endpoint, cache.path(), &[&["download"], args].concat());

    let nobody = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()); // free again
    let parts = [
        "error: cannot download `org/tiny`",
        "a mirror of the hub in HF_ENDPOINT",
        &format!("cannot reach {nobody}: "),
    ];
    fails(&mut download(&nobody, &["org/tiny"]), &parts);
    let parts = ["cannot download `org/tiny`; unset the variable", "HF_HUB_OFFLINE is set, so the hub is not asked"];
    fails(download(&endpoint, &["org/tiny"]).env("HF_HUB_OFFLINE", "1"), &parts);
    fails(&mut download(&endpoint, &["org/other"]), &["`org/other`; is the name right?", "answered 404 Not Found"]);
    let parts = ["cannot download `org/tiny` at `v2`; are name and revision right?", "/revision/v2 answered 404"];
    fails(&mut download(&endpoint, &["org/tiny", "--revision", "v2"]), &parts);
    fails(&mut download(&endpoint, &["org/gated"]), &["answered 401", "does HF_TOKEN give access to it?"]);
    // Before anything is fetched.
    fails(&mut download(&endpoint, &["org/tiny", "../x"]), &["`../x` is not a model's name on the hub"]);
    assert!(!cache.path().join("models--org--tiny").exists());
}
