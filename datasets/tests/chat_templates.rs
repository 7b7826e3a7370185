//! Chat templates: those that models come with, and those that try to break out.

use serde_json::json;
use thermocline_datasets::{ChatMessage, ChatTemplate, Error, open_checkpoint};

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
     message['content'] + '<|im_end|>\\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

fn render(template: &str) -> Result<String, Error> {
    ChatTemplate::new(template, "<s>", "</s>")?.render(&[ChatMessage::new("user", " Hi, <you>! ")], true)
}

#[test]
fn a_conversation_becomes_a_prompt() {
    let expected = "<|im_start|>user\n Hi, <you>! <|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(render(CHATML).expect("rendered"), expected);
}

#[test]
fn what_real_templates_use_is_there() {
    for (template, expected) in [
        ("{{ bos_token }}{{ messages[0].content | trim }}{{ eos_token }}", "<s>Hi, <you>!</s>"),
        ("{{ messages[0].content.strip() }}|{{ ' a b '.rstrip() }}|{{ 'xxax'.lstrip('x') }}", "Hi, <you>!| a b|ax"),
        ("{{ 'a,b,c'.split(',')[1] }}{{ 'a b'.split()[-1] }}{{ 'a:b:c'.split(':', 1)[1] }}", "bbb:c"),
        (
            "{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith('ab') }} {{ 'aB'.upper() ~ 'aB'.lower() }}",
            "True False ABab",
        ),
        ("{{ 'aXbX'.replace('X', '-') }}", "a-b-"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'a': 1}.get('b', 'no') }}", "a1no"),
        ("{{ {'a': [1, '<é>', none, true]} | tojson }}", "{\"a\": [1, \"<é>\", null, true]}"),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ("{% set ns = namespace(n=0) %}{% for m in [1, 2] %}{% set ns.n = ns.n + m * 2 %}{% endfor %}{{ ns.n }}", "6"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ 1 + 2 }}{{ 'a' + 'b' ~ 1 + 1 }}{{ [1] + [2] }}{{ '-' * 3 }}{{ 7 - 2 - 1 }}", "3ab2[1, 2]---4"),
        ("{{ ['a', 'b'] | join(', ') }}", "a, b"),
        ("{{ strftime_now is defined }}", "False"),
    ] {
        assert_eq!(render(template).expect(template), expected, "{template}");
    }
}

#[test]
fn exceptions_and_errors_come_with_their_text() {
    let error = render("{{ raise_exception('roles must alternate') }}").expect_err("raised").to_string();
    assert!(error.contains("chat template") && error.contains("roles must alternate"), "{error}");
    assert!(matches!(ChatTemplate::new("{% for %}", "", ""), Err(Error::Template { .. })));
    assert!(matches!(ChatTemplate::new(&"x".repeat(1 << 20), "", ""), Err(Error::Template { .. })));
}

/// The most memory that this process has ever used, in bytes.
fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap_or("VmHWM: 0 kB");
    line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[test]
fn hostile_templates_end_and_stay_small() {
    for template in [
        // Endless.
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [[1]] recursive %}{{ loop(x) if false }}{{ loop([[1]]) }}{% endfor %}",
        // Long output.
        "{% for a in range(99999) %}{{ '0123456789012345678901234567890123456789' }}{% endfor %}",
        "{{ 'x' * 99999999 }}",
        // Doubling, by every way to build a text.
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s|length }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s|replace('x', 'xx') %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s * 10 %}{% endfor %}{{ ns.s|length }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
        "{% macro f(s, n) %}{% if n %}{{ f(s + s, n - 1) }}{% endif %}{% endmacro %}{{ f('x', 60) }}",
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s.split('') %}{% endfor %}",
        "{% set ns = namespace(s='\"') %}{% for i in range(60) %}{% set ns.s = ns.s|tojson %}{% endfor %}",
        // Nesting beyond any stack, if its fuel lasts.
        "{% set ns = namespace(s=[]) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
    ] {
        let result = render(template);
        assert!(matches!(result, Err(Error::Template { .. })), "{template} gave {result:?}");
    }
    assert!(peak_rss_bytes() < 1 << 30, "{} bytes", peak_rss_bytes());
}

#[test]
fn the_real_models_templates_render_if_the_models_are_there() {
    let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let talk =
        [ChatMessage::new("user", "Hi"), ChatMessage::new("assistant", "Hello"), ChatMessage::new("user", "Bye")];
    for (name, system) in [
        ("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("qwen05", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ] {
        let path = models.join(name).join("model.gguf");
        if !path.exists() {
            eprintln!("{} is not there (datasets/fetch-models.sh {name}): skipped", path.display());
            continue;
        }
        let source = open_checkpoint(&path).expect("opened").chat_template().expect("a template");
        let template = ChatTemplate::new(&source, "", "<|im_end|>").expect("parsed");
        let expected = format!(
            "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\
             Hello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(template.render(&talk, true).expect("rendered"), expected);
        if name == "qwen05" {
            let mut context = serde_json::Map::new();
            context.insert("messages".into(), json!([{"role": "user", "content": "Hi"}]));
            context.insert("tools".into(), json!([{"type": "function", "function": {"name": "f"}}]));
            let prompt = template.render_with(&context).expect("rendered");
            assert!(
                prompt.contains("\n{\"function\": {\"name\": \"f\"}, \"type\": \"function\"}\n</tools>"),
                "{prompt}"
            );
        }
    }
}
