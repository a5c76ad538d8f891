//! Jinja2 as HF transformers sets it up for chat templates, on our engine.

use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Rest;
use minijinja::{Environment, Error, ErrorKind, Value};

use super::date::{seconds_since_epoch, strftime};
use super::source::MODULO;
use super::{filters, methods, python, text_filters};

/// What a template may do before it is stopped; one unit is an instruction or 64 bytes of text. The templates in use
/// need some tens a turn.
const FUEL: u64 = 200_000;

/// What it may do on the stack of whoever renders it. An instruction may put a value into a list, and lists in each other
/// are let go of by recursion: with more fuel they take more stack than a thread has.
const LITTLE_FUEL: u64 = 2_000;

/// Enough for lists in each other as deep as [`FUEL`] makes them.
const LARGE_STACK: usize = 256 << 20;

/// The environments of a template: with little fuel, and with all that it may have, on a [large stack](on_large_stack).
pub(super) fn environments() -> Result<[Environment<'static>; 2]> {
    let mut little = environment()?;
    let whole = little.clone();
    little.set_fuel(Some(LITTLE_FUEL));
    Ok([little, whole])
}

/// Does `work` on a thread of its own that has room for deep recursion.
pub(super) fn on_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat template".to_owned()).stack_size(LARGE_STACK);
        let thread = thread.spawn_scoped(scope, work);
        let thread = thread.map_err(|error| python::invalid(format!("no thread for a chat template: {error}")))?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// An environment without templates; they are to be [adapted](super::source::adapted).
fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.context("the whitespace rules of chat templates")?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, state, value| Ok(out.write_str(&python::text(state, value)?)?));
    filters::add(&mut environment);
    text_filters::add(&mut environment);
    environment.add_function(MODULO, python::modulo);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| strftime(&format, seconds_since_epoch()));
    Ok(environment)
}
