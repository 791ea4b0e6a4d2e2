//! `/metrics` and `/healthz` for those who watch over a gateway.

use std::io;
use std::time::Duration;

use actix_web::dev::Server;
use actix_web::http::header::ContentType;
use actix_web::web::{self, Data};
use actix_web::{App, HttpResponse, HttpServer};
use tokio::time::sleep;
use tracing::{error, info};
use wgkex_common::config::Listen;

use crate::metrics::Metrics;

/// How long to wait for a port that is taken.
const RETRY: Duration = Duration::from_secs(10);

/// Serves for ever. A port that is taken is said once and tried again: keys matter more than metrics.
pub async fn serve(listen: Listen, metrics: Metrics) {
    let mut said = false;
    loop {
        match bind(&listen, metrics.clone()) {
            Ok(server) => {
                info!(worker_listen = %listen, "metrics are served");
                said = false;
                if let Err(error) = server.await {
                    error!(worker_listen = %listen, %error, "metrics are not served any more");
                }
            }
            Err(error) if !said => {
                said = true;
                error!(worker_listen = %listen, %error, "metrics are not served, this is tried again");
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

fn bind(listen: &Listen, metrics: Metrics) -> io::Result<Server> {
    let app = move || {
        App::new()
            .app_data(Data::new(metrics.clone()))
            .route("/metrics", web::get().to(text))
            .route("/healthz", web::get().to(|| async { HttpResponse::Ok().body("ok\n") }))
    };
    let server = HttpServer::new(app).workers(1).disable_signals();
    Ok(server.bind((listen.host.as_str(), listen.port))?.run())
}

async fn text(metrics: Data<Metrics>) -> HttpResponse {
    match metrics.text() {
        Ok(text) => HttpResponse::Ok().insert_header(ContentType::plaintext()).body(text),
        Err(error) => HttpResponse::InternalServerError().body(error.to_string()),
    }
}
