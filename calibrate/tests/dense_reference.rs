//! The dense forward against plain f64 loops written from the equations.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use support::{RandomCheckpoint, random_tokens, tiny_config};
use thermocline_calibrate::dense::{DenseLayer, Embedding, Head};
use thermocline_datasets::Activation;

fn matvec(weight: &[f64], x: &[f64]) -> Vec<f64> {
    weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

fn norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let scale = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

fn rotate(head: &mut [f64], position: usize, theta: f64) {
    let half = head.len() / 2;
    for i in 0..half {
        let angle = position as f64 / theta.powf(2.0 * i as f64 / head.len() as f64);
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * angle.cos() - b * angle.sin();
        head[i + half] = a * angle.sin() + b * angle.cos();
    }
}

/// Logits of every position of one window.
fn reference(ckpt: &RandomCheckpoint, tokens: &[u32]) -> Vec<Vec<f64>> {
    let c = &ckpt.config;
    let (eps, d) = (f64::from(c.rms_norm_eps), c.head_dim);
    let table = ckpt.tensor("model.embed_tokens.weight");
    let embed = |&id: &u32| table[id as usize * c.hidden_size..(id as usize + 1) * c.hidden_size].to_vec();
    let mut x: Vec<Vec<f64>> = tokens.iter().map(embed).collect();
    for layer in 0..c.n_layers {
        let get = |name: &str| ckpt.tensor(&format!("model.layers.{layer}.{name}"));
        let project = |name: &str, x: &[f64]| -> Vec<f64> {
            let bias = get(&format!("self_attn.{name}_proj.bias"));
            matvec(&get(&format!("self_attn.{name}_proj.weight")), x).iter().zip(bias).map(|(v, b)| v + b).collect()
        };
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (position, x) in x.iter_mut().enumerate() {
            let normed = norm(x, &get("input_layernorm.weight"), eps);
            let (mut q, mut k) = (project("q", &normed), project("k", &normed));
            q.chunks_mut(d).chain(k.chunks_mut(d)).for_each(|head| rotate(head, position, f64::from(c.rope_theta)));
            keys.push(k);
            values.push(project("v", &normed));
            let mut mixed = vec![0.0; q.len()];
            for head in 0..c.n_heads {
                let kv = head / (c.n_heads / c.n_kv_heads) * d;
                let q = &q[head * d..(head + 1) * d];
                let weights: Vec<f64> = keys
                    .iter()
                    .map(|k| (q.iter().zip(&k[kv..kv + d]).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                for (weight, value) in weights.iter().zip(&values) {
                    (0..d).for_each(|i| mixed[head * d + i] += weight / total * value[kv + i]);
                }
            }
            let delta = matvec(&get("self_attn.o_proj.weight"), &mixed);
            x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
        }
        for x in &mut x {
            let normed = norm(x, &get("post_attention_layernorm.weight"), eps);
            let (gate, up) =
                (matvec(&get("mlp.gate_proj.weight"), &normed), matvec(&get("mlp.up_proj.weight"), &normed));
            let act = |g: f64, u: f64| match c.activation {
                Activation::Silu => g / (1.0 + (-g).exp()) * u,
                Activation::Relu => g.max(0.0) * u,
                Activation::Drelu => g.max(0.0) * u.max(0.0),
            };
            let h: Vec<f64> = gate.into_iter().zip(up).map(|(g, u)| act(g, u)).collect();
            let delta = matvec(&get("mlp.down_proj.weight"), &h);
            x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
        }
    }
    let (weight, head) = (ckpt.tensor("model.norm.weight"), ckpt.tensor("lm_head.weight"));
    x.iter().map(|x| matvec(&head, &norm(x, &weight, eps))).collect()
}

#[test]
fn equals_plain_loops() {
    for activation in [Activation::Silu, Activation::Relu, Activation::Drelu] {
        let ckpt = RandomCheckpoint::new(tiny_config(activation), 7);
        // More than one query block, and two windows that must not see each other.
        let (n_windows, window_len) = (2, 150);
        let tokens = random_tokens(n_windows * window_len, ckpt.config.vocab_size, 3);
        let mut x = Embedding::load(&ckpt).unwrap().rows(&tokens).unwrap();
        for index in 0..ckpt.config.n_layers {
            let layer = DenseLayer::load(&ckpt, index).unwrap();
            x = layer.attention(&x, n_windows, window_len).unwrap();
            let neurons = layer.neurons(&layer.ffn_input(&x).unwrap()).unwrap();
            layer.ffn_output(&mut x, neurons.h).unwrap();
        }
        let logits = Head::load(&ckpt).unwrap().logits(&x).unwrap();
        let expected: Vec<f64> = tokens.chunks(window_len).flat_map(|w| reference(&ckpt, w)).flatten().collect();
        let scale = expected.iter().fold(0.0f64, |max, v| max.max(v.abs()));
        let worst = logits.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        // f32 rounding is 6e-8 per operation; sums of up to 150 terms through three layers stay within some 100 of it.
        assert!(worst < 2e-5 * scale, "{activation:?}: {worst} of {scale}");
        assert_eq!(logits.len(), expected.len());
    }
}

/// Attention is linear in the inputs of the value projection: value rows times a token's mixture are what its head puts out.
#[test]
fn values_of_mixtures_are_what_heads_put_out() {
    let ckpt = RandomCheckpoint::new(tiny_config(Activation::Silu), 7);
    let c = &ckpt.config;
    let (n_windows, window_len, d) = (2, 150, c.head_dim);
    let x = Embedding::load(&ckpt).unwrap().rows(&random_tokens(n_windows * window_len, c.vocab_size, 3)).unwrap();
    let [weight, bias] = ["weight", "bias"].map(|part| ckpt.tensor(&format!("model.layers.0.self_attn.v_proj.{part}")));
    let layer = DenseLayer::load(&ckpt, 0).unwrap();
    let mut seen = 0;
    layer
        .attention_observed(&x, n_windows, window_len, |inputs| {
            let tokens = inputs.mixtures.chunks(c.hidden_size).zip(inputs.output.chunks(c.n_heads * d));
            for (t, (mixture, output)) in tokens.enumerate() {
                let mixture: Vec<f64> = mixture.iter().map(|v| f64::from(*v)).collect();
                let head = t % window_len % c.n_heads;
                let rows = head / (c.n_heads / c.n_kv_heads) * d;
                let values = matvec(&weight[rows * c.hidden_size..(rows + d) * c.hidden_size], &mixture);
                for ((value, bias), got) in values.iter().zip(&bias[rows..rows + d]).zip(&output[head * d..]) {
                    assert!((value + bias - f64::from(*got)).abs() < 1e-5, "token {t}: {value} + {bias}, not {got}");
                }
                seen += 1;
            }
        })
        .unwrap();
    assert_eq!(seen, n_windows * window_len);
}

#[test]
fn refuses_ids_outside_the_vocabulary() {
    let ckpt = RandomCheckpoint::new(tiny_config(Activation::Silu), 7);
    let error = Embedding::load(&ckpt).unwrap().rows(&[1, 50]).unwrap_err();
    assert!(matches!(error, thermocline_calibrate::Error::TokenId { id: 50, position: 1, vocab_size: 50 }));
}
