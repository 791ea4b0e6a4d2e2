//! The task that answers sync requests: the live keys that a gateway or another broker lacks, chunk by chunk.
//!
//! The previous stop of a request is [`requesters`](super::requesters), the next one of its chunk the client that requested
//! it.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use wgkex_common::mqtt::{Message, MqttHandle, PublishError};
use wgkex_common::wire::message::SyncRequest;

use crate::bus::metrics::Metrics;
use crate::fleet::live_keys::LiveKeys;

/// Answers one request after the other, until the session ends: so never more than one chunk is queued before new keys.
pub async fn run(
    bus: MqttHandle,
    live: Arc<Mutex<LiveKeys>>,
    mut requests: mpsc::Receiver<SyncRequest>,
    metrics: Metrics,
) {
    while let Some(request) = requests.recv().await {
        let chunk = live.lock().chunk(&request, Instant::now());
        metrics.keys_given.inc_by(chunk.keys.len() as u64);
        let payload = serde_json::to_vec(&chunk).unwrap_or_default();
        if bus.publish(Message::transient(request.from.chunks(), payload)).await == Err(PublishError::SessionEnded) {
            return;
        }
    }
}
