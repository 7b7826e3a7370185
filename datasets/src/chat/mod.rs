//! Chat templates: messages to the prompt that a model was trained on.
//!
//! A template is a program from a stranger's file, so it runs in a sandbox: its instructions, its nesting, what it
//! writes and the text that it builds are bounded, and it reaches nothing but the messages.

mod budget;
mod json;
mod lexer;
mod methods;
mod operators;

use crate::contained::contained;
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value};
use std::sync::Arc;

/// Longest template, in bytes.
pub(crate) const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Longest prompt that a template may write beyond what the messages hold, in bytes.
const MAX_OUTPUT_BYTES: usize = 1 << 20;
/// Instructions that a template may run; one message takes about fifty.
const MAX_FUEL: u64 = 500_000;
/// How deep macros, loops and blocks may call one another.
const MAX_RECURSION: usize = 64;
/// Values can be nested about as deep as there is fuel, and are dropped recursively; pages are only used if that
/// happens.
const STACK_BYTES: usize = 256 << 20;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl ChatMessage {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A parsed template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Checks the syntax of a template. `bos_token` and `eos_token` are the texts that the template may ask for
    /// under those names.
    ///
    /// # Errors
    /// If the template is no Jinja or too long.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self> {
        if source.len() > MAX_TEMPLATE_BYTES {
            let reason = format!("{} bytes, at most {MAX_TEMPLATE_BYTES}", source.len());
            return Err(Error::Template { reason });
        }
        let source = operators::guard(source).map_err(|reason| Error::Template { reason })?;
        let template = Self { source, bos_token: bos_token.to_owned(), eos_token: eos_token.to_owned() };
        template.in_thread(0, |environment| environment.template_from_str(&template.source).map(|_| String::new()))?;
        Ok(template)
    }

    /// The prompt for a conversation; `add_generation_prompt` ends it where the assistant begins.
    ///
    /// # Errors
    /// If the template fails, refuses the conversation (`raise_exception`), or runs over its limits.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        let messages: Vec<serde_json::Value> =
            messages.iter().map(|m| serde_json::json!({"role": m.role, "content": m.content})).collect();
        let mut context = serde_json::Map::new();
        context.insert("messages".into(), messages.into());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        self.render_with(&context)
    }

    /// The same for a context of one's own: `messages`, `tools` and whatever else the template looks at.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(&self, context: &serde_json::Map<String, serde_json::Value>) -> Result<String> {
        let input_bytes = context.values().map(json::text_len).sum();
        let mut context = context.clone();
        context.entry("bos_token").or_insert_with(|| self.bos_token.clone().into());
        context.entry("eos_token").or_insert_with(|| self.eos_token.clone().into());
        self.in_thread(input_bytes, |environment| {
            let values = context.iter().map(|(k, v)| (k.as_str(), json::to_value(v)));
            environment.template_from_str(&self.source)?.render(Value::from_pairs(values))
        })
    }

    /// Runs something with a fresh environment, on a thread whose stack holds whatever the fuel can nest.
    fn in_thread<F>(&self, input_bytes: usize, run: F) -> Result<String>
    where
        F: FnOnce(&Environment<'_>) -> Result<String, minijinja::Error> + Send,
    {
        let failed = |reason: String| Error::Template { reason };
        std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().name("chat template".into()).stack_size(STACK_BYTES);
            let render = || contained(|| run(&environment(input_bytes)).map_err(|e| explain(&e)));
            let thread = builder.spawn_scoped(scope, render);
            let thread = thread.map_err(|e| failed(format!("no thread for it: {e}")))?;
            let ended = thread.join().map_err(|_| failed("its thread failed".into()))?;
            ended.map_err(|panic| failed(format!("it cannot be used: {panic}")))?.map_err(failed)
        })
    }
}

/// An environment whose limits are fresh: one for each rendering.
fn environment<'a>(input_bytes: usize) -> Environment<'a> {
    let budget = Arc::new(budget::Budget::new(input_bytes.saturating_add(MAX_OUTPUT_BYTES)));
    let mut environment = Environment::new();
    environment.set_fuel(Some(MAX_FUEL));
    environment.set_recursion_limit(MAX_RECURSION);
    let mut syntax = SyntaxConfig::builder();
    if let Ok(syntax) = syntax.trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_unknown_method_callback({
        let budget = budget.clone();
        move |_, value, method, arguments| methods::call(&budget, value, method, arguments)
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", json::tojson);
    budget::install(&mut environment, &budget);
    environment
}

fn explain(error: &minijinja::Error) -> String {
    match (error.kind(), error.line()) {
        (ErrorKind::OutOfFuel, _) => format!("it did not end within {MAX_FUEL} instructions"),
        (_, Some(line)) => format!("line {line}: {error}"),
        _ => error.to_string(),
    }
}
