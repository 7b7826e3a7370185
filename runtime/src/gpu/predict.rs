//! How fast a plan should be, from its bytes and the speeds of the tiers.

use super::plan::GpuPlan;
use crate::plan::Mode;
use serde::Serialize;

/// Speeds that bound a token, in bytes a second.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GpuSpeeds {
    /// Device memory, read by the product kernel.
    pub device: f64,
    /// Pinned host memory, read in place by the fused kernel; where sketches are copied from there, by the faster of kernel and copy
    /// engine.
    pub link: f64,
    /// The same memory, read and computed with by the host's threads; 0 without them.
    pub host: f64,
}

/// What a layer costs beyond its bytes: six kernels, each of which fetches its input before it can begin and brings its
/// sums together at the end. Measured on an H200 (analysis/records/gpu-h200), as the next two.
const LAYER_SECONDS: f64 = 20e-6;

/// What the two kernels of the predictor and the choice add to it.
const CHOICE_SECONDS: f64 = 11e-6;

/// What either grows by for each column of the input, which every kernel reads, normalises and adds up.
const COLUMN_SECONDS: f64 = 14e-6 / 8192.0;

/// What it costs more if the host's threads take part: they must see the request, the last of them ends later than the mean
/// one, and it must be seen.
const EXCHANGE_SECONDS: f64 = 30e-6;

/// Share of the time between two layers' reads over the link that fetching early wins: it begins late and ends early,
/// some of what it brings is not needed, and the kernels beside it become slower. Where the host's threads take part it wins
/// nothing that could be measured.
const LOOKAHEAD_WINS: f64 = 0.45;

/// A speed and where it comes from.
#[derive(Debug, Clone, Serialize)]
pub struct GpuPrediction {
    /// Decode speed.
    pub tok_s: f64,
    /// Share of the cold neurons that are not cached which the host's threads compute.
    pub host_share: f64,
    /// `device`, `link` or `link + host`.
    pub bottleneck: &'static str,
    /// The formula, with its numbers.
    pub formula: String,
}

impl GpuPlan {
    /// Expected decode speed: device memory, then link and host side by side.
    pub fn predict(&self, speeds: &GpuSpeeds) -> GpuPrediction {
        let device = (self.device_bytes_per_token + self.cache_bytes_per_token) as f64;
        let host = self.host_bytes_per_token as f64;
        let n_layers = self.hot_neurons.len() as f64;
        let device_seconds = device / speeds.device;
        let exchange = if speeds.host > 0.0 && host > 0.0 { EXCHANGE_SECONDS } else { 0.0 };
        let is_chosen = exchange > 0.0 || matches!(self.request.base.mode, Mode::Sparse { .. });
        let choice = if is_chosen { CHOICE_SECONDS } else { 0.0 };
        let between = n_layers * (LAYER_SECONDS + choice + COLUMN_SECONDS * self.hidden_size as f64 + exchange);
        let early = if speeds.host > 0.0 {
            0.0
        } else {
            (self.lookahead_bytes_per_token as f64)
                .min((device_seconds + between) * speeds.link * LOOKAHEAD_WINS)
                .min(host)
        };
        // Sketches cross the link while everything else goes on, too; the threads take part in the rest.
        let sketches = self.streamed_bytes_per_token as f64;
        let late = (sketches - (device_seconds + between) * speeds.link).max(0.0);
        let rows = host - early - sketches;
        let both = (late + rows) / (speeds.link + speeds.host);
        let host_seconds = both.max(late / speeds.link);
        let bottleneck = match (device_seconds > host_seconds, speeds.host > 0.0) {
            (true, _) => "device",
            (false, true) => "link + host",
            (false, false) => "link",
        };
        let gb = 1e9;
        let pinned = if host > 0.0 {
            let [host, link, threads] = [host - sketches, speeds.link, speeds.host].map(|v| v / gb);
            let streamed = match late / gb {
                late if sketches > 0.0 => format!(" + {late:.3} of {:.3} GB of sketches", sketches / gb),
                _ => String::new(),
            };
            let early = if early > 0.0 { format!(" - {:.3} fetched early", early / gb) } else { String::new() };
            format!(" + ({host:.3}{early}{streamed}) GB pinned / ({link:.1} GB/s link + {threads:.1} GB/s host)")
        } else {
            String::new()
        };
        GpuPrediction {
            tok_s: 1.0 / (device_seconds + host_seconds + between),
            host_share: if rows > 0.0 { (both * speeds.host / rows).min(1.0) } else { 0.0 },
            bottleneck,
            formula: format!(
                "tok/s = 1 / ({:.2} GB device / {:.0} GB/s{pinned} + {:.1} ms between kernels)",
                device / gb,
                speeds.device / gb,
                1e3 * between
            ),
        }
    }
}
